"""The command line `parablock`: arguments and printing, without logic.

main       all commands but `deploy`, and the exit codes
show_data  `parablock data`
export_run  `parablock export`
deploy     `parablock deploy`: keys, server, sites
deploy_keys   `parablock deploy keys`: an authority, requests, certificates
deploy_start  `parablock deploy init` and `check`: before the first run
doctor     the checks of `parablock doctor`
terminal   progress, Ctrl-C, and the last lines of a run
"""
