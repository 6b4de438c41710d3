"""How the dataset of emoji images and captions is made, which models/ldm/emoji64 and emoji128 are trained on."""
