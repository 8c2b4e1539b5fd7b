"""The pose models of the tiny bundle: a person detector, whole-body keypoints and 3D joints, trained on drawn pictures.

    python -m training.pose_models detector|keypoints|joints --seconds S --directory D     trains one
    python -m training.pose_models export --directory D --to bundles/tiny/pose            writes the bundle's files
    python -m training.pose_models curves --directory D --to docs/curves                  draws how the losses fell

`pictures` draws what they learn from and spoils it as videos are spoilt; `detector`, `keypoints` and `joints` each have
one network's batches and loss; `loop` trains any of them; `export` writes the formats that services/pose reads.
"""
