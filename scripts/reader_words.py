"""Word lists of the reader's made-up documentation, written for this project.

No real documentation is among the training text: reader_data.py puts sentences together
from these words, from syllables and from random pieces of the vocabulary.
"""

VERBS = """
accept access accumulate activate add adjust aggregate align allocate analyse append apply approximate
arrange assemble assert assign attach average balance bind blend block broadcast build bundle buffer calculate
call cancel cast centre change check choose clamp clean clear clip clone close cluster collapse collect
combine compare compile complete compose compress compute concatenate configure confirm connect construct
contract convert convolve coordinate copy correct count create crop cut debug decide declare decode decompose
decorate decrease deduplicate define delay delete deliver derive describe deserialize detach detect determine
differentiate discard dispatch display distribute divide download draw drop dump duplicate echo edit eliminate
embed emit enable encode encrypt enforce enumerate erase escape estimate evaluate examine exchange exclude
execute expand explain expose export extend extract factor fetch fill filter find finish fit fix flatten flip
flush fold force forget format forward freeze gather generate get group guard guess handle hash hide highlight
hold identify ignore import improve include increase indent index infer inherit initialize inject insert
inspect install integrate interpolate interpret intersect invert invoke iterate join keep label launch
learn limit link list listen load locate lock log look lower make manage map mark mask match materialize
measure merge minimize mirror mix modify monitor move multiply name negate normalize notify observe obtain
offer omit open optimize order override pack pad paint parse partition pass patch pause perform permute pick
pin plan plot poll pop populate post predict prepare prepend preserve prevent print process produce profile
project promote propagate protect provide prune publish pull push put quantize query queue quote raise rank
read rebuild receive recompute record recover reduce refresh register reject release reload remove rename
render reorder repair repeat replace report request require reserve reset reshape resize resolve restore
restrict resume retain retrieve retry return reverse revert rewrite roll rotate round route run sample save
scale scan schedule score search seek select send separate serialize serve set shift show shrink shuffle sign
simplify simulate skip slice smooth solve sort split squeeze stack standardize start stop store stream strip
subtract suggest sum summarize suspend swap switch synchronize tag take test throttle tile toggle trace track
train transfer transform translate transmit transpose traverse trigger trim truncate try tune unify unlock
unpack unwrap update upload use validate verify visit wait walk warn watch weigh widen wrap write yield zip
""".split()

NOUNS = """
access account accuracy action adapter address agent alarm algorithm alias alpha amount anchor angle answer
application archive area argument array aspect asset assignment attachment attempt attribute audience axis
backend backup badge balance band bar base baseline basis batch beam behaviour bin binding bit block board body
boundary box branch bridge browser bucket budget buffer bug build button byte cache calendar call callback
camera candidate capacity card case catalog category cell centre certificate chain channel chapter character
chart check checkpoint checksum child chunk circle class clause client clock cluster code codec coefficient
collection collector color column command comment commit comparison component condition config connection
constant constraint consumer container content context contour control converter coordinate copy core corner
correlation cost count counter covariance cover credential criterion cube currency cursor curve cycle daemon
dashboard data database dataset date day deadline decimal declaration decoder decorator default definition
degree delimiter delta density dependency depth derivative description descriptor detail determinant device
diagonal diagram dialog dictionary difference digest digit dimension direction directory disk distance
distribution divisor document domain driver duration edge effect element email encoder encoding endpoint
energy engine entry enumeration environment epoch error estimate estimator event example exception exchange
executor expression extension factor factory failure feature field figure file filter flag flow folder font
format formula fraction fragment frame frequency function future gap gate gateway generator geometry gradient
grammar graph grid group guard handle handler handshake hash header heap height hierarchy histogram history
hook host hour id identifier image implementation import index indicator input instance instruction integer
integral interface interval inventory inverse item iterable iterator job journal kernel key keyword label
lambda language latency layer layout leaf length level library license limit line link list listener literal
loader location lock log logarithm logger loop loss machine macro magnitude manager manifest map margin marker
market mask matrix maximum mean measure median member memory menu merge message metadata method metric
middleware minimum minute mode model module moment monitor month movie mutex name namespace neighbour network
node noise norm notification number object observation observer octet offset operand operation operator
optimizer option order origin outcome outline output overflow owner package packet padding page pair palette
panel paragraph parameter parent parser part partition password patch path pattern payload peak peer percentile
period permission permutation phase pipeline pixel placeholder plan platform plugin point pointer policy
polygon polynomial pool port portion position power precision predicate prefix preview priority probability
problem procedure process processor product profile program progress project promise prompt property protocol
provider proxy quantile quantity quarter query question queue quota radius random range rank rate ratio reader
record rectangle recursion reference region register registry relation release remainder replica report
repository request resolution resource response result review rewrite ring role root rotation round route
router row rule runner sample scalar scale scanner scene schedule scheduler schema scope score screen script
section sector seed segment selection selector semaphore sensor sentence separator sequence series server
service session set setting shape shard share sheet shell shift side signal signature singleton site size
slice slot snapshot socket solution solver sort sorter source space span spectrum speed spline square stack
stage standard state statement statistic status step storage strategy stream string structure style subset
substring suffix suite sum summary supplier surface symbol table tag target task template tensor term test
text theme thread threshold ticket tile time timeout timer timestamp title token tolerance tool topic total
trace track trajectory transaction transform transition translation tree trigger tuple type unit update upload
url user validator value variable variance vector vendor version vertex view viewport volume wait warning
wave weight wheel widget width window word worker workspace wrapper writer year zone
""".split()

ADJECTIVES = """
absolute abstract active actual adaptive additional adjacent alternative anonymous approximate arbitrary
asynchronous atomic automatic available average base basic bilinear binary blank boolean bounded brief broken
cached central circular clean closed coarse common compact compatible complete complex compressed concrete
conditional connected consecutive constant contiguous continuous cubic cumulative current custom cyclic daily
dead deep default dense detailed deterministic diagonal different digital direct discrete distinct dry dynamic
eager early effective efficient eligible empty encrypted equal exact existing explicit exponential external
extra fast final finite first fixed flat floating free full fuzzy general generic given global gradual greedy
hidden hierarchical high hot idle immutable implicit incoming incremental independent indexed initial inner
internal invalid inverse isolated joint known large last lazy left legal linear live local logical long loose
low main major manual masked maximal maximum median minimal minimum minor missing mixed modern modified monthly
mutable named narrow native natural negative nested new next nonzero normal null numeric obsolete odd old
open optional ordered ordinary original orthogonal outer parallel partial passive pending periodic permanent
persistent plain polar positive possible previous primary private public quick quiet random rapid raw real
recent recursive regular relative reliable remote requested required reserved right rough safe scaled
secondary secure selected separate sequential shallow shared sharp short signed silent similar simple single
slow small soft sorted sparse special specific square stable stale standard static strict strong symbolic
symmetric synchronous temporary tight total transient triangular trusted typed unique universal unknown unused
upper useful valid variable verbose virtual visible weak weekly weighted whole wide zero
""".split()

ADVERBS = """
lazily eagerly quickly slowly safely silently recursively repeatedly atomically carefully together again once
twice exactly approximately element-wise row-wise in-place asynchronously automatically explicitly implicitly
uniformly randomly strictly loosely directly remotely locally globally sequentially concurrently periodically
""".split()

PREPOSITIONS = "of for in on from with by to into over under between across through within without against along".split()

GLUE = """
a an the this that these those and or but not no if when while where which whose as at is are be been was were has have
had do does can may must should will would it its they them their there then than each every all any both some
such only also just more most other same so one two three four five ten using used given after before until during instead whether
true false none null self default optional etc about because how what why who
""".split()

EXTRA = """
Parameters Returns Raises Examples Notes Yields Attributes Args Warnings Warning Note See Also References Methods
int float str bool list tuple dict set bytes object callable ndarray array-like DataFrame Series iterable sequence
optional int, str, TypeError ValueError KeyError IndexError RuntimeError OSError NotImplementedError import from def class lambda
print return assert async await with yield pass raise except finally else elif for while
Documentation Question Explain Describe documentation question purpose please summary sentence
numpy pandas requests torch scipy matplotlib sklearn os sys json http https www html xml csv yaml toml utf ascii unicode
sin cos tan exp log sqrt abs max min sum mean std var dot arg idx src dst tmp ctx cfg env ptr len str num img vec mat
func fn init iter enter exit async io api cli gui sql url uri uuid tcp udp ssl ssh ftp dns ip
""".split()

ONSETS = "b br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str t th tr v w x y z".split()
VOWELS = "a a a e e e i i i o o o u u ai ea ee ei ia ie io oa oo ou ua y".split()
CODAS = ["", "", "", "", "", "b", "ck", "d", "ft", "g", "k", "l", "ld", "m", "mp", "n", "nd", "ng", "nt", "p", "r", "rd", "rk", "rm", "rn", "s", "sh", "sk", "st", "t", "th", "x", "z"]

FOREIGN = """
naïve façade déjà größe über straße señal niño língua ação žluťoučký kůň łódź привет данные таблица строка поток
δοκιμή αριθμός 数据 返回 数组 文字列 行列 処理 함수 배열 مرحبا קלט é ü ö ñ ß µ π Σ ∑ √ ≤ ≥ ≠ → ← ∞ ± × ÷ ° € £ – — … “ ” ‘ ’ « » • 😀 🚀 ✅ 🎉
""".split()
