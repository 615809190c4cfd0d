"""The names and types of every table's columns, spelled once. No pyarrow here: `data.tables` makes the Arrow schema.

A column type is an Arrow type's name, `list<T>` of the length given when the schema is made, or `tensor`: a
fixed-shape array stored as fixed-size binary, whose dtype and shape stand in the column's metadata.
"""

MANIFEST = {
    "key": "string",  # unique and stable: source-relative file, then '#' and the row or member
    "sample_id": "int64",  # row in key order
    "label": "int32",  # -1 for none
    "uri": "string",  # file, relative to the source, so that data can move
    "offset": "int64",  # bytes into a file, -1 where the image is a Parquet row
    "length": "int64",  # bytes
    "row_group": "int32",  # -1 where the image is a byte range
    "row": "int32",  # within the row group
    "shard": "int32",
}

SCORES = {
    "sample_id": "int64",
    "key": "string",
    "label": "int32",
    "score": "float32",  # mean over timesteps of the noise-prediction error; higher is harder
    "errors": "list<float32>",  # one a timestep, in the teacher's own convention (see the metadata)
    "shard": "int32",
}

EMBEDDINGS = {
    "sample_id": "int64",
    "key": "string",
    "label": "int32",
    "features": "tensor",  # float16, pooled features of a frozen encoder
    "shard": "int32",
}

REJECTED = {"key": "string", "uri": "string", "stage": "string", "reason": "string"}

SELECTION = {
    "sample_id": "int64",
    "key": "string",
    "label": "int32",
    "score": "float32",
    "rank": "int64",  # in its class, 0 is easiest
    "class_size": "int64",
    "position": "int32",  # order of choice in its class
}

SELECTION_CLASSES = {
    "label": "int32",
    "name": "string",
    "size": "int64",
    "quota": "int64",
    "shortfall": "int64",  # images fewer than its equal or proportional share, for want of more
    "nominal_f": "float64",  # interval alone: share of the class, from the easiest, that is sampled evenly
    "deepest_rank": "float64",  # of the chosen, as a share of the class
    "score_min": "float32",  # of the chosen
    "score_max": "float32",
}

# Followed by the tokens of every vision encoder, tensors too: `vision`, `vision_NAME` of further ones (int8, or uint16 that
# holds bf16), both flips where flips are on, and with int8 `vision_scale`, `vision_NAME_scale` (float32, one a token).
CONDENSED = {
    "sample_id": "int64",
    "key": "string",
    "label": "int64",  # as dataset hubs number classes
    "image": "struct<bytes, path>",  # encoded bytes as the source had them
    "pixels": "tensor",  # uint8, without a VAE
    "latent_mean": "tensor",  # float16, both flips where flips are on, with a VAE
    "latent_std": "tensor",
}

CLASSES = {
    "label": "int32",
    "name": "string",
    "prompt": "string",
    "text_states": "tensor",
    "text_mask": "tensor",
}

SAMPLES = {
    "index": "int64",
    "label": "int32",
    "image": "binary",  # PNG
}

# Followed by the features of every network that measures, by its name (float32), and `probabilities` of Inception.
FEATURES = {"id": "int64", "label": "int32"}
