"""The artefact: each domain's kept neurons, and the folder that holds them."""
