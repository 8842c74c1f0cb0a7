"""The engine of real sites: the same server and clients, with Flower carrying the bytes.

engine         the server's run over Flower
grid           the server's end of the transport
lanes          a client as the server sees it: two streams, and the SuperNodes that carry them
exchange       the header of one exchange, a request and its reply
stream         two ordered streams over exchanges that may be lost, repeated or cut short
courier        a site's ClientApp, between Flower and the trainer
local_socket   the socket between a ClientApp and its trainer
mailbox        the trainer's communication thread
masked         the trainer's side of secure aggregation
session        the files of a site, so that its trainer can die at any moment
pace           changes to functions of Flower: they ask more often and hold less
"""
