"""Bounds on what is read from a folder or Hub repository, before it is read.

Each leaves room: pathways of 4096 domains, or of a model with 126 FFN blocks of 53248 neurons, stay
far below. What the bounds let through is checked against what the description says.
"""

MOST_JSON_BYTES = 64 * 2**20
"""Of a JSON file. A profile of 200,000 documents, with a digest of each, has a tenth; parsed, the
worst takes some twenty times its size in memory."""

MOST_DEPTH = 64
"""How deep values of a JSON file may be nested. Our own have seven levels."""

MOST_HEADER_BYTES = 32 * 2**20
"""Of the header of a safetensors file: some 300,000 tensors."""

MOST_DIMENSIONS = 8
"""Of a tensor. Masks have one and matrices two; what healing trains may have more."""

MOST_TEXT_BYTES = 4 * 2**20
"""Of a text file, such as a repository's card."""

MOST_BLOCKS = 8192
"""FFN blocks of a model. The largest models have 126 layers, and a block or two in each."""

MOST_WIDTH = 2**22
"""Neurons of an FFN block, or width of its input; of the widest models 53248. Products of two
widths and a size in bytes are far from 64 bits."""

MOST_DOMAINS = 4096
"""Domains of a model. Each may be two files to be fetched."""

MOST_ROWS = 8192
"""Of a saved report: one per domain and arm."""

MOST_NAME = 256
"""Characters of a name, such as that of an FFN block or of an architecture."""

MOST_PATH = 4096
"""Characters of a model's name, which may be the path of a folder."""

MOST_CLUSTERS = 1024
"""Clusters of an FFN block's tokens, each with kept neurons of its own."""

MOST_GROUPS = 1024
"""Groups of an FFN block's neurons, of which each token has some."""

MOST_FRAME = 65536
"""Token ids in a list of a domain's signature. Chat templates begin with a few dozen; some
tokenizers have tens of thousands of special tokens."""
