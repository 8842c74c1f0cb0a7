"""Privacy of updates: clipping, noise and its accounting, and secure aggregation.

protection           clipping, and noise added by the client
accounting           ε for a δ
discrete_gaussian    whole numbers of noise
keystream            secret random numbers from a key
identities           a site's signature under the keys that it advertises
masking              masks, keys and secret shares
masked_client        the client's side of secure aggregation
masked_server        the server's side
secure_aggregation   both sides, made for a run
"""
