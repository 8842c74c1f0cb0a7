"""The method: what client and server compute, without threads, bytes or clocks."""
