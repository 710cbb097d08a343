"""How records become plain arrays and back, one codec a file, encode beside decode.

Every codec turns records into named arrays that stock zarr stores and reads; what they mean is the
arithmetic documented in each module and in docs/cache-format.md.
"""
