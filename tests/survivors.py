"""What a model may go through and has to be the same after."""

import copy
import pickle

from transformers import AutoModelForCausalLM


def survivors(model, folder):
    """Yield a model as it is when it is saved and loaded, copied, and pickled."""
    model.save_pretrained(folder)
    yield AutoModelForCausalLM.from_pretrained(folder)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
