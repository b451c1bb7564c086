from .page import write_curve_page as write_curve_page
from .printing import print_curve as print_curve
from .results import CurveResult as CurveResult
from .running import read_curve as read_curve
from .running import run_curve as run_curve
from .settings import CurveSettings as CurveSettings
from .settings import make_curve_settings as make_curve_settings
from .work import CurveProgress as CurveProgress
