"""Files that survive a crash.

files            writes files and folders whole or not at all, and keeps one process in a folder
checkpoint       saves and restores the state of a run; the one list of what that state is
site_store       what a site keeps of a run, to go on after any death
audit_log        an append-only log whose lines are chained by hashes
release_history  what a server has on record of a client, for its own ledger to be compared with
release_ledger   what a client or the server has let out of its hands, in that log
run_directory    the files of a run, and the figures that follow from its rows and spans
"""

PLAN_NAME, FIGURES_NAME = "comparison.json", "compare.json"
"""Files of a comparison: what it compares, and what came of it."""
