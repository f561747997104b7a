"""Text and SMILES to tokens, shards, a global order, masks, states and packed batches. Numpy only."""
