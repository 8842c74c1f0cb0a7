"""The command line `parablock`: arguments and printing, without logic.

main       the commands, and the exit codes
evaluate   `parablock eval`
talk       `parablock chat` and `generate`
show_data  `parablock data`
export_run  `parablock export`
deploy     `parablock deploy`: keys, server, sites
deploy_keys   `parablock deploy keys`: an authority, requests, certificates
deploy_start  `parablock deploy init` and `check`: before the first run
audit      `parablock audit`: verify logs, and say what they record
forgetting  `parablock forget`
doctor     the checks of `parablock doctor`
output     standard output that outlasts its reader
word_table  tables that break between words
terminal   progress, Ctrl-C, and the last lines of a run
"""
