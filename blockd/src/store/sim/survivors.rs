//! Which of the un-synced operations survive a power cut: the lists to try, in the order in which
//! their effects reach the disk.

use std::ops::Range;

use super::faults::mix;

/// How much to try per crash point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Up to this many un-synced operations every subset is tried (at most 16 is sensible: 65,536).
    pub exhaustive: usize,
    /// Above that, random subsets in addition to the regular families.
    pub random: usize,
    /// Chooses the random subsets; the same seed chooses the same ones.
    pub seed: u64,
    /// Members of one family (prefixes, suffixes, one omitted, one alone, torn, grown, reversed
    /// pairs) at most; a larger family is sampled evenly, its first and last member included.
    pub family: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { exhaustive: 7, random: 16, seed: 1, family: 256 }
    }
}

/// How much of an operation survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first half of the sectors of a write.
    FirstHalf,
    /// The last half of the sectors of a write.
    LastHalf,
    /// The length that a write gave the file, not its bytes, which read as zeroes where the file is
    /// new.
    Length,
}

/// An un-synced operation that survived a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Survivor {
    /// Its position in the log.
    pub op: usize,
    /// How much of it.
    pub part: Part,
}

impl Survivor {
    fn whole(op: usize) -> Self {
        Survivor { op, part: Part::Whole }
    }
}

/// The un-synced operations at a crash point.
pub(super) struct Unsynced {
    /// Their positions in the log, ascending.
    pub(super) ops: Vec<usize>,
    /// Writes of more than one sector.
    pub(super) tearable: Vec<usize>,
    /// Writes that end past the durable length.
    pub(super) growing: Vec<usize>,
    /// Writes and punches of one file that overlap: the earlier, the later.
    pub(super) overlapping: Vec<(usize, usize)>,
}

/// Offers every list of survivors to `offer`; some may come more than once. Returns true when some
/// family was sampled.
pub(super) fn each(
    unsynced: &Unsynced,
    bounds: &Bounds,
    point: usize,
    offer: &mut dyn FnMut(&[Survivor]),
) -> bool {
    let ops = &unsynced.ops;
    let mut lists = Lists { ops, list: Vec::with_capacity(ops.len()), offer };
    let mut sampled = false;
    if ops.len() <= bounds.exhaustive {
        for mask in 0..1_u64 << ops.len() {
            lists.choose(|at| mask >> at & 1 == 1);
        }
    } else {
        sampled |= families(&mut lists, bounds, point);
    }
    for at in spread(unsynced.tearable.len(), bounds.family, &mut sampled) {
        for part in [Part::FirstHalf, Part::LastHalf] {
            lists.with_part(Survivor { op: unsynced.tearable[at], part });
        }
    }
    if unsynced.tearable.len() > 1 {
        for part in [Part::FirstHalf, Part::LastHalf] {
            lists.all_torn(&unsynced.tearable, part);
        }
    }
    for at in spread(unsynced.growing.len(), bounds.family, &mut sampled) {
        lists.with_part(Survivor { op: unsynced.growing[at], part: Part::Length });
    }
    for at in spread(unsynced.overlapping.len(), bounds.family, &mut sampled) {
        let (earlier, later) = unsynced.overlapping[at];
        lists.reversed(earlier, later);
    }
    sampled
}

fn families(lists: &mut Lists<'_>, bounds: &Bounds, point: usize) -> bool {
    let mut sampled = false;
    let count = lists.ops.len();
    for end in spread(count + 1, bounds.family, &mut sampled) {
        lists.choose(|at| at < end);
    }
    for start in spread(count, bounds.family, &mut sampled) {
        lists.choose(|at| at >= start);
    }
    for one in spread(count, bounds.family, &mut sampled) {
        lists.choose(|at| at != one);
        lists.choose(|at| at == one);
    }
    for round in 0..bounds.random as u64 {
        let seed = mix(bounds.seed ^ mix(point as u64 ^ mix(round)));
        // In turn about an eighth, a half and seven eighths survive.
        let of_eight = [1, 4, 7][(round % 3) as usize];
        lists.choose(|at| mix(seed ^ at as u64) % 8 < of_eight);
    }
    sampled
}

/// All of `0..count`, or `max` of them, evenly spaced from the first to the last.
fn spread(count: usize, max: usize, sampled: &mut bool) -> impl Iterator<Item = usize> + use<> {
    let shown = count.min(max.max(2));
    *sampled |= shown < count;
    (0..shown).map(move |i| if shown < count { i * (count - 1) / (shown - 1) } else { i })
}

struct Lists<'a> {
    ops: &'a [usize],
    list: Vec<Survivor>,
    offer: &'a mut dyn FnMut(&[Survivor]),
}

impl Lists<'_> {
    /// Those whose place among the un-synced operations is chosen.
    fn choose(&mut self, chosen: impl Fn(usize) -> bool) {
        let ops = self.ops.iter().enumerate().filter(|(at, _)| chosen(*at));
        self.list.clear();
        self.list.extend(ops.map(|(_, op)| Survivor::whole(*op)));
        (self.offer)(&self.list);
    }

    /// One in part, with all others and with none.
    fn with_part(&mut self, torn: Survivor) {
        let part = |op: &usize| if *op == torn.op { torn } else { Survivor::whole(*op) };
        self.list.clear();
        self.list.extend(self.ops.iter().map(part));
        (self.offer)(&self.list);
        (self.offer)(&[torn]);
    }

    /// All that can tear torn at once: what a cut in the middle of many writes may leave.
    fn all_torn(&mut self, tearable: &[usize], part: Part) {
        let torn = |op: &usize| match tearable.contains(op) {
            true => Survivor { op: *op, part },
            false => Survivor::whole(*op),
        };
        self.list.clear();
        self.list.extend(self.ops.iter().map(torn));
        (self.offer)(&self.list);
    }

    /// Two in reversed order, with all others and with none.
    fn reversed(&mut self, earlier: usize, later: usize) {
        self.list.clear();
        for op in self.ops.iter().filter(|op| **op != earlier) {
            self.list.push(Survivor::whole(*op));
            if *op == later {
                self.list.push(Survivor::whole(earlier));
            }
        }
        (self.offer)(&self.list);
        (self.offer)(&[Survivor::whole(later), Survivor::whole(earlier)]);
    }
}

/// Where the second half of the sectors of a byte range begins; `None` when it touches one sector
/// only and so cannot tear.
pub(super) fn middle(range: &Range<u64>) -> Option<u64> {
    const SECTOR: u64 = 512;
    let (first, end) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
    (end - first >= 2).then(|| (first + (end - first) / 2) * SECTOR)
}
