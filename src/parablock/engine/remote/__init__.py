"""The engine of real sites: the same server and clients, joined by one stream of gRPC for each site.

frames            greetings and frames: what crosses a connection, and its limits
numbered_stream   two ordered streams of messages that outlive connections
grpc_options      settings of gRPC at both ends
listener          the server's port: who may enter
site_spans        a site's record of its computation, read strictly
client_place      what the server knows of one client
remote_transport  the server's end of the transport, with a place for each client
site_channel      a site's end: it calls, takes part, and calls again after every cut
site_inbox        what the compute thread of a site has not taken yet, within bounds
site_client       the client of a site: it goes on from its disk after any death
remote_engine     the engine: the server of a run with sites that come and go
"""
