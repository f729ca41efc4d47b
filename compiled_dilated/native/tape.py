"""stub"""
class Untranslatable(ValueError): pass
def encode(graph, operands): raise Untranslatable("functions are not yet translated")
