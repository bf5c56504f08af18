"""Run transformers' own model and write down what it computes: the recordings in tests/reference/.

    python convert/record_reference.py [--device cpu|cuda] [--only NAME] [--out tests/reference]

The one file that imports torch. Needs torch, transformers 5.23 and this package's Python files; MLX need not be there.
Every file is an .npz without pickles. Its entry `provenance` is a JSON string:

    kind      "logits" or "trajectory"
    device    "cpu", or "cuda" with the card's name;   dtype   what the model ran in
    versions  python, torch, transformers, numpy;   commit   of this repository;   seed   of every random choice
    model     {"config": config.json, "weights": arguments of recordings.random_weights}, or {"folder": "demo"}

Kind "logits": softcapped logits of single decoder passes. `cases` in the provenance lists, by name,
`{"rms_error": RMS of the logits' error against truth}`; per case NAME the arrays are

    NAME/prompt    int32 [B, P]     ids, left-padded           NAME/padding  int32 [B]  padding tokens in front
    NAME/canvases  int32 [n, B, L]  committed before           NAME/canvas   int32 [B, L]
    NAME/signal    float32 [B, L, V], only with self-conditioning: the logits it was computed from
    NAME/logits    float32 [B, L, V], as computed in `dtype`   NAME/truth    the same from a run in float64

Kind "trajectory": whole runs of transformers' `generate`, with its random choices. C canvases, S steps (the most of
any canvas; zeros behind the last step of a shorter one), B rows, L canvas positions:

    prompt     int32 [B, P]           ids, left-padded         padding    int32 [B]
    canvas     int32 [C, B, L]        the ids each canvas started from
    draws      float32 [C, S, B, L]   one number in [0, 1): the middle of the drawn id's interval of the cumulative
                                      distribution (float64, vocabulary order), so that inverting it draws that id
    ids        int32 [C, S, B, L]     the fresh random ids of the renoise
    steps      int32 [C]              steps each canvas took, until its last row was done
  and what came of them
    guess      int32 [C, S, B, L]     the ids drawn            accepted   bool [C, S, B, L]
    best       int32 [C, S, B, L]     the argmax canvas        entropy    float32 [C, S, B]  mean, nats
    row_steps  int32 [C, B]           steps until the row was settled; 0 for a row that had met a stop id before
    settled    bool [C, B]            whether it was, within the steps allowed
    committed  int32 [C, B, L]        after the canvas: `best`, with padding behind the first stop id
  `settings` in the provenance are the generation options, `margins` how close any decision of the run came to falling
  the other way (logits between the best two tokens, nats at the entropy bound and at the confidence threshold).
  What a row "did" after it was settled is transformers' business: compare steps below row_steps alone.
"""
