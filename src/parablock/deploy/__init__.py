"""Real sites: the processes of a deployment, and how an operator starts them.

credentials    TLS certificates, and the keys of SuperNodes
authority      who may be the server and who a site: signs requests, revokes
certificates   the key, certificate and authority of one end, and their checks
revocations    the list of revoked certificates
signing_request   what an end sends to the authority
superlink      the server in a federation: a SuperLink that knows the run
server_app     the ServerApp: one run of the configuration
client_app     the ClientApp: the trainer of a site for one run
site           the file of a site
variables      environment variables and files that processes find each other by
processes      command lines and environments of all processes
one_machine    a whole Flower federation on this machine
site_session   a site in one session of a run
site_service   a site's process, which serves one run after another
"""
