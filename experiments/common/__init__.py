"""What the experiments share: folders, kept parts, results, pictures and protocols."""
