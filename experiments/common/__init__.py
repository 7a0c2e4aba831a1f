"""What the experiments share: training, protocols, folders and kept parts, results, timing and pictures."""
