def growth(out): return ""
