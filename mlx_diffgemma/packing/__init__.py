"""Making a pack. In: a checked checkpoint and a recipe. Out: a folder, known to the byte beforehand."""
