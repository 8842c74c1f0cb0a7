"""Messages, their bytes, and the links that carry them.

messages    all messages between server and clients
sealing     the messages of secure aggregation
codec       message framing: header, vectors, checksum
quantize    payload formats, exact and quantized
sparse      payloads of the largest elements alone
transport   the two ends of a transport, and the traffic ledger
"""
