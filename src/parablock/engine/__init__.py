"""What drives server and clients: the two threads, the loops, the clocks."""
