"""From text to pathways: documents, windows, activation profiles, scores, selection."""
