"""The cache as it lies on disk: records, codecs, manifest, shards, store, writer and reader."""
