"""From the shards of a prepared folder to packed batches: a global order, masks, states, packing. Numpy only."""
