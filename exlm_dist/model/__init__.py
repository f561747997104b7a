"""ExLM and the plain masked language model: one ordered list of layers, each `Stream -> Stream`."""
