"""Real sites: the processes of a deployment over Flower, and how an operator starts them.

credentials    TLS certificates, and the keys of SuperNodes
authority      who may be the server and who a site: signs requests, revokes
certificates   the key, certificate and authority of one end, and their checks
revocations    the list of revoked certificates
signing_request   what an end sends to the authority
superlink      the server: a SuperLink that knows the run
server_app     the ServerApp: one run of the configuration
client_app     the ClientApp, which hands messages to the trainer
site_trainer   the long-lived trainer of a site
site           the file of a site
variables      environment variables and files that processes find each other by
processes      command lines and environments of all processes
one_machine    a whole deployment on this machine
warm           ClientApps that are there at once
hand_over      the socket by which a ClientApp is asked for
"""
