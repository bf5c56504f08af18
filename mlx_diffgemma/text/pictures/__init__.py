"""In: paths, bytes, URLs of pictures, videos and documents. Out: pictures as patches, when the tower looks at them."""
