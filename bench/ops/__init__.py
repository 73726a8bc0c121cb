"""One module per op family, each with ``cases(generator)``: the bench rows at the real model dimensions."""
