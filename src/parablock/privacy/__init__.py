"""What keeps an update from being read: clipping, noise and its accounting, sums of which nobody sees a part."""
