"""Drawn figures that the tiny bundle is trained and measured on: characters, motions, pictures, keypoints, captions.

Everything is made from a seeded generator, in batches, in plain PyTorch: parameters on the CPU, pictures on whatever
device their parameters are moved to. Pictures are square; lengths are millimetres in the camera frame of
services/pose/skeleton.py (x right, y down, z forward), joints are SMPL's 24.

Two splits never meet: held-out characters pair colours of shirt and trousers that no training character pairs, and one
class of motion is held out.
"""

SIDE = 128
"""Height and width of the pictures, pixels."""
FRAMES = 17
"""Of a clip; 16 per second."""
