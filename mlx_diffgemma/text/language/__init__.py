"""The texts an answer may be: a regex, a JSON schema, choices, a text with holes or a function's parameters come in;
a `Language` goes out, as byte automata and literal texts. It knows no tokenizer: `generation/constraint` turns bytes
into ids."""
