"""The engine: server, clients and their threads, with one round told file by file.

A round in the order in which it happens (★: read these first):

    plans           the settings of both sides: ServerPlan, ClientPlan
    participation   the server draws the clients that it asks
    local_steps     … and how many local steps each of them takes
    downlink        it sends each of them the commits that this client lacks, and asks for round t
    pipeline        a client's two threads: one computes, one communicates; the only place that makes threads
    client          the compute thread commits, trains block b_t (training/trainer), and hands its update over
  ★ update_form     the update's form: Δ is cut, encoded, accepted, folded, and taken over
    server          the server takes chunks from any client in any order
    round_fold      … checks each, and folds a chunk as soon as every expected client has delivered it
    releasing       … a masked sum is unmasked, and what is given away is counted first
    refusals        … what does not fit is refused, counted and told
    strays          … as are updates that no round waits for
    update_store    … while chunks that memory does not hold wait in a file
    server          the commit: the mean moves the block, and the new value goes down while the next round computes

Around it:

  ★ contract        an engine's input and result, and the parts that all engines share
    inprocess       the engine of this process: a machine of two threads a client, over simulated links
    faults          fault injection
    flower/         the engine of real sites

The method itself, without threads and bytes, is `algorithm/parablock.py`; `algorithm/sequential.py` is its oracle.
"""
