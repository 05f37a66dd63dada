"""Operations on whole images: export, import, pin, prefetch."""
