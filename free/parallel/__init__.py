"""Many processes at once: a window over several, slots that samples join and leave, samples shared out in shards."""
