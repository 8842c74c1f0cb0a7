"""Real sites: the processes of a deployment, direct or inside a Flower federation, and how operators start them.

direct_server  the server of a direct deployment: it listens, runs, and shows who is there
direct_local   a whole direct deployment on this machine
door           who may enter at the server, and how a site knows the server
strangers      who tries to, and has no certificate
site_service   a site's process: it serves one run after another
site_identity  a site's signature, which other sites can check
site_session   a site in one session of a run
site_training  what it does there
server_audit   the audit log of a server
status         what a server shows of its sites, and what its operator asks of it
metrics_endpoint  the same for Prometheus
log_files      logs, with rotation
allocation     the memory of long-lived processes
starter_files  what an operator starts with: configuration, systemd unit, compose file
policy         what a run may ask of a site
guarded_trainer  the same at work, in every round
site_check     everything a run would need of a site, before it joins
authority      who may be the server and who a site: signs requests, revokes
certificates   the key, certificate and authority of one end, and their checks
revocations    the list of revoked certificates
signing_request   what an end sends to the authority
server_app     the ServerApp: one run of the configuration
client_app     the ClientApp: the trainer of a site for one run
site           the file of a site
variables      environment variables and files that processes find each other by
processes      keys, command lines and environments of all processes
one_machine    a whole Flower federation on this machine
"""
