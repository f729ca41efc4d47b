from . import costs as costs
from . import footprint as footprint
from . import liveness as liveness
from . import peak as peak
