//! A persistent map from page number to 4 KiB page.
//!
//! - A clone costs two counters; a change copies the path to the page it touches, and nothing else,
//!   as long as other clones hold that path.
//! - The shape depends only on which pages are present: nodes without pages do not exist and the
//!   tree is never higher than its highest page needs. So equal content gives equal fingerprints.
//! - Fingerprints are kept in the nodes and made on demand; a change forgets them along its path.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Bytes per page.
pub(super) const PAGE: usize = 4096;

const FAN_OUT: usize = 32;
const FAN_BITS: u32 = FAN_OUT.trailing_zeros();

#[derive(Debug)]
pub(super) struct Page {
    bytes: [u8; PAGE],
    print: OnceLock<u128>,
}

impl Page {
    pub(super) fn new(bytes: &[u8; PAGE]) -> Arc<Self> {
        Arc::new(Page { bytes: *bytes, print: OnceLock::new() })
    }

    pub(super) fn bytes(&self) -> &[u8; PAGE] {
        &self.bytes
    }
}

impl Clone for Page {
    /// The copy is about to change.
    fn clone(&self) -> Self {
        Page { bytes: self.bytes, print: OnceLock::new() }
    }
}

#[derive(Debug, Clone, Default)]
enum Slot {
    #[default]
    Empty,
    Page(Arc<Page>),
    Node(Arc<Node>),
}

#[derive(Debug, Default)]
struct Node {
    slots: [Slot; FAN_OUT],
    print: OnceLock<u128>,
}

impl Clone for Node {
    /// The copy is about to change.
    fn clone(&self) -> Self {
        Node { slots: self.slots.clone(), print: OnceLock::new() }
    }
}

/// The map. A slot at height `h` covers `FAN_OUT^h` pages; a page sits at height 0.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages {
    root: Slot,
    height: u32,
    count: u64,
}

/// Pages that a slot at `height` covers, as a power of two.
fn bits(height: u32) -> u32 {
    height * FAN_BITS
}

/// The child of a node at `height` that covers page `number`.
fn child(number: u64, height: u32) -> usize {
    super::super::to_usize(number >> bits(height - 1)) % FAN_OUT
}

impl Pages {
    /// Number of pages present.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn get(&self, number: u64) -> Option<&Page> {
        if !self.covers(number) {
            return None;
        }
        let (mut slot, mut height) = (&self.root, self.height);
        loop {
            match slot {
                Slot::Empty => return None,
                Slot::Page(page) => return Some(page),
                Slot::Node(node) => slot = &node.slots[child(number, height)],
            }
            height -= 1;
        }
    }

    /// The first page from `number` on.
    pub(super) fn first_from(&self, number: u64) -> Option<u64> {
        if self.covers(number) { first_from(&self.root, self.height, 0, number) } else { None }
    }

    pub(super) fn set(&mut self, number: u64, page: Arc<Page>) {
        let slot = self.slot(number);
        let new = matches!(slot, Slot::Empty);
        *slot = Slot::Page(page);
        self.count += u64::from(new);
    }

    /// The bytes of a page, which is made of zeroes if it is not present.
    pub(super) fn change(&mut self, number: u64) -> &mut [u8; PAGE] {
        if self.get(number).is_none() {
            self.set(number, Page::new(&[0; PAGE]));
        }
        let Slot::Page(page) = self.slot(number) else { unreachable!("the page was just made") };
        let page = Arc::make_mut(page);
        page.print = OnceLock::new();
        &mut page.bytes
    }

    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.count -= remove(&mut self.root, self.height, 0, &range);
        while self.height > 0 {
            let Slot::Node(node) = &self.root else { break };
            if node.slots[1..].iter().any(|slot| !matches!(slot, Slot::Empty)) {
                break;
            }
            self.root = node.slots[0].clone();
            self.height -= 1;
        }
        if self.count == 0 {
            *self = Pages::default();
        }
    }

    /// Equal for equal content, and only then (as far as 128 bits of a strong hash go).
    pub(super) fn fingerprint(&self) -> u128 {
        fingerprint(&self.root)
    }

    fn covers(&self, number: u64) -> bool {
        bits(self.height) >= u64::BITS || number >> bits(self.height) == 0
    }

    /// The place of a page, with a path to it that is ours alone.
    fn slot(&mut self, number: u64) -> &mut Slot {
        while !self.covers(number) {
            if self.count > 0 {
                let mut node = Node::default();
                node.slots[0] = std::mem::take(&mut self.root);
                self.root = Slot::Node(Arc::new(node));
            }
            self.height += 1;
        }
        let mut slot = &mut self.root;
        for height in (1..=self.height).rev() {
            if matches!(slot, Slot::Empty) {
                *slot = Slot::Node(Arc::default());
            }
            let Slot::Node(node) = slot else { unreachable!("pages sit at height 0 only") };
            let node = Arc::make_mut(node);
            node.print = OnceLock::new();
            slot = &mut node.slots[child(number, height)];
        }
        slot
    }
}

/// The first page from `number` on below a slot whose first page is `first`.
fn first_from(slot: &Slot, height: u32, first: u64, number: u64) -> Option<u64> {
    match slot {
        Slot::Empty => None,
        Slot::Page(_) => (first >= number).then_some(first),
        Slot::Node(node) => {
            let from = if number > first { child(number, height) } else { 0 };
            node.slots.iter().enumerate().skip(from).find_map(|(index, slot)| {
                let first = first + ((index as u64) << bits(height - 1));
                first_from(slot, height - 1, first, number)
            })
        }
    }
}

/// Removes the pages of `range` below a slot whose first page is `first`; returns how many.
fn remove(slot: &mut Slot, height: u32, first: u64, range: &Range<u64>) -> u64 {
    let last = first + ((1_u64 << bits(height).min(u64::BITS - 1)) - 1);
    if matches!(slot, Slot::Empty) || range.end <= first || last < range.start {
        return 0;
    }
    if range.start <= first && last < range.end {
        return count(&std::mem::take(slot));
    }
    let Slot::Node(node) = slot else { unreachable!("a page is inside the range or outside") };
    let node = Arc::make_mut(node);
    node.print = OnceLock::new();
    let mut removed = 0;
    for (index, slot) in node.slots.iter_mut().enumerate() {
        let first = first + ((index as u64) << bits(height - 1));
        removed += remove(slot, height - 1, first, range);
    }
    if node.slots.iter().all(|slot| matches!(slot, Slot::Empty)) {
        *slot = Slot::Empty;
    }
    removed
}

fn count(slot: &Slot) -> u64 {
    match slot {
        Slot::Empty => 0,
        Slot::Page(_) => 1,
        Slot::Node(node) => node.slots.iter().map(count).sum(),
    }
}

fn fingerprint(slot: &Slot) -> u128 {
    match slot {
        Slot::Empty => 0,
        Slot::Page(page) => *page.print.get_or_init(|| digest([page.bytes.as_slice()])),
        Slot::Node(node) => *node.print.get_or_init(|| {
            let prints = node.slots.each_ref().map(|slot| fingerprint(slot).to_le_bytes());
            digest([prints.as_flattened()])
        }),
    }
}

/// A strong 128-bit hash of the concatenation.
pub(super) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut print = [0; 16];
    hasher.finalize_xof().fill(&mut print);
    u128::from_le_bytes(print)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    fn page(fill: u8) -> Arc<Page> {
        Page::new(&[fill; PAGE])
    }

    #[derive(Debug, Clone)]
    enum Step {
        Set(u64, u8),
        Change(u64, u8),
        Remove(u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let number = || prop_oneof![0..100_u64, 0..(1_u64 << 24), Just((1 << 51) - 1)];
        prop_oneof![
            (number(), any::<u8>()).prop_map(|(n, fill)| Step::Set(n, fill)),
            (number(), any::<u8>()).prop_map(|(n, fill)| Step::Change(n, fill)),
            (number(), 0..200_u64).prop_map(|(n, len)| Step::Remove(n, n + len)),
            number().prop_map(|n| Step::Remove(n, 1 << 51)),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_sorted_map(steps in proptest::collection::vec(step(), 1..60)) {
            let (mut pages, mut model) = (Pages::default(), BTreeMap::new());
            // Never cloned, so it changes in place: kept fingerprints must be forgotten there too.
            let mut alone = Pages::default();
            for step in steps {
                let before = (pages.clone(), model.clone());
                match step {
                    Step::Set(n, fill) => {
                        pages.set(n, page(fill));
                        alone.set(n, page(fill));
                        model.insert(n, [fill; PAGE]);
                    }
                    Step::Change(n, fill) => {
                        pages.change(n)[7] = fill;
                        alone.change(n)[7] = fill;
                        model.entry(n).or_insert([0; PAGE])[7] = fill;
                    }
                    Step::Remove(from, to) => {
                        pages.remove(from..to);
                        alone.remove(from..to);
                        model.retain(|n, _| !(from..to).contains(n));
                    }
                }
                for (pages, model) in [(&pages, &model), (&before.0, &before.1)] {
                    prop_assert_eq!(pages.count(), model.len() as u64);
                    for (n, bytes) in model {
                        prop_assert_eq!(pages.get(*n).map(Page::bytes), Some(bytes));
                        let next = model.range(n + 1..).next().map(|(n, _)| *n);
                        prop_assert_eq!(pages.first_from(n + 1), next);
                    }
                    prop_assert_eq!(pages.first_from(0), model.keys().next().copied());
                }
                let mut rebuilt = Pages::default();
                for (n, bytes) in model.iter().rev() {
                    rebuilt.set(*n, Page::new(bytes));
                }
                prop_assert_eq!(pages.fingerprint(), rebuilt.fingerprint());
                prop_assert_eq!(alone.fingerprint(), rebuilt.fingerprint());
                prop_assert_eq!(pages.height, rebuilt.height);
                let same = model == before.1;
                prop_assert_eq!(pages.fingerprint() == before.0.fingerprint(), same);
            }
        }
    }
}
