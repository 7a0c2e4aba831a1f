"""The main job in parts: its options, a rehearsal, scores on unseen classes, pictures and a report."""
