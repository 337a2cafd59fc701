"""What decodes a stream: sessions, decoders, the cache, and files in and out."""
