use std::collections::BTreeSet;

use super::super::conformance;
use super::*;
use proptest::prelude::*;

mod crash;
mod faults;

const SECTOR: usize = 512;

/// A store that holds a durable, zeroed file `f` of `sectors` sectors, and a handle of it.
fn with_file(sectors: usize) -> (SimStore, Arc<dyn File>) {
    let mut image = Image::new();
    image.put("f", Content::from_bytes(&vec![0; sectors * SECTOR]));
    let store = SimStore::from_image(image);
    let file = store.open("f", Access::Write).unwrap();
    (store, file)
}

/// The first byte of every sector of `name`, as text; `-` when there is no such file.
fn letters(image: &Image, name: &str) -> String {
    let Some(content) = image.get(name) else { return "-".into() };
    let bytes = content.read(0, usize::try_from(content.len()).unwrap());
    let letter = |byte: &u8| if *byte == 0 { '.' } else { char::from(*byte) };
    bytes.iter().step_by(SECTOR).map(letter).collect()
}

/// Writes whole sectors, named by letters, from sector `at` on.
fn put(file: &Arc<dyn File>, at: u64, text: &str) {
    let bytes: Vec<u8> = text.bytes().flat_map(|letter| [letter; SECTOR]).collect();
    file.write_at(at * SECTOR as u64, &bytes).unwrap();
}

#[test]
fn simulated_store_conforms() {
    let store = SimStore::new();
    conformance::store(&store);
    conformance::concurrent(&store.create("a").unwrap());
    conformance::store(&SimStore::without_log(Image::new()));
}

#[test]
fn log_holds_what_took_effect_in_order() {
    let store = SimStore::new();
    let file = store.create("a").unwrap();
    file.write_at(3, b"xy").unwrap();
    file.set_len(100).unwrap();
    file.punch(0, 4).unwrap();
    file.sync().unwrap();
    file.set_read_only(true).unwrap();
    store.rename("a", "b").unwrap();
    store.remove("b").unwrap();
    store.sync_names().unwrap();
    store.remove("b").unwrap_err();
    file.read_at(0, &mut [0; 4]).unwrap();

    let text: Vec<_> = store.log().iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            "create a as #0",
            "write #0 3+2",
            "set length #0 100",
            "punch #0 0+4",
            "sync #0",
            "make read-only #0",
            "rename #0 a to b",
            "remove #0 b",
            "sync names"
        ]
    );
    assert_eq!(store.log_len(), 9);
}

#[test]
fn store_without_log_records_nothing() {
    let store = SimStore::without_log(Image::new());
    store.create("a").unwrap().write_at(0, b"x").unwrap();
    assert_eq!((store.log_len(), store.log()), (0, Vec::new()));
    assert_eq!(store.live_image().get("a").unwrap().read(0, 9), b"x");
}

#[test]
fn image_survives_a_round_trip_and_numbers_follow() {
    let store = SimStore::new();
    store.create("b").unwrap().write_at(0, b"b").unwrap();
    store.create("a").unwrap().write_at(0, b"a").unwrap();

    let again = SimStore::from_image(store.live_image());
    again.create("c").unwrap();
    again.remove("a").unwrap();

    assert_eq!(again.base(), store.live_image());
    let text: Vec<_> = again.log().iter().map(ToString::to_string).collect();
    assert_eq!(text, ["create c as #2", "remove #0 a"]);
}

#[test]
fn sparse_file_of_64_gib_is_cheap() {
    const END: u64 = 64 << 30;
    let store = SimStore::new();
    let file = store.create("a").unwrap();
    file.set_len(END).unwrap();
    file.write_at(END - 1, b"z").unwrap();
    file.write_at(0, b"a").unwrap();

    assert_eq!(file.allocated().unwrap(), 8192);
    let mut bytes = [1; 4096];
    file.read_at(END / 2, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
    file.punch(0, END).unwrap();
    assert_eq!((file.allocated().unwrap(), file.size().unwrap()), (0, END));
    assert_eq!(store.live_image().get("a").unwrap().read(END - 1, 5), [0]);
}

#[test]
fn the_last_page_is_given_back_up_to_the_end_of_the_file() {
    let (_, file) = with_file(10);
    assert_eq!(file.allocated().unwrap(), 8192);
    file.punch(4096, 1024).unwrap();
    assert_eq!((file.allocated().unwrap(), file.size().unwrap()), (4096, 5120));

    let (_, file) = with_file(10);
    file.punch(4096, 1023).unwrap();
    assert_eq!(file.allocated().unwrap(), 8192);
    file.set_len(4096).unwrap();
    assert_eq!(file.allocated().unwrap(), 4096);
    file.set_len(1).unwrap();
    assert_eq!(file.allocated().unwrap(), 4096);
    file.set_len(0).unwrap();
    assert_eq!(file.allocated().unwrap(), 0);
}

#[test]
fn images_can_be_damaged() {
    let mut image = Image::new();
    image.put("a", Content::from_bytes(&[0b101; 10]));
    let whole = image.clone();

    image.flip_bit("a", 9, 2).unwrap();
    image.overwrite("a", 10, b"xyz").unwrap();
    image.truncate("a", 12).unwrap();

    assert_eq!(image.get("a").unwrap().read(8, 100), [0b101, 0b001, b'x', b'y']);
    assert_eq!(whole.get("a").unwrap().read(0, 100), [0b101; 10]);
    assert_ne!(image, whole);
    image.truncate("a", 10).unwrap();
    image.flip_bit("a", 9, 2).unwrap();
    assert_eq!(image, whole);

    assert_eq!(image.names().collect::<Vec<_>>(), ["a"]);
    assert_eq!(image.flip_bit("a", 10, 0).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(image.flip_bit("a", 0, 8).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(image.flip_bit("b", 0, 0).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(image.truncate("b", 0).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(image.truncate("a", u64::MAX).unwrap_err().kind(), Kind::Invalid);
    assert_eq!(image.overwrite("a", u64::MAX, b"x").unwrap_err().kind(), Kind::Invalid);
    assert_eq!(image.remove("a").unwrap().len(), 10);
    assert_eq!(image.remove("a").unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn fingerprints_tell_names_contents_lengths_and_holes_apart() {
    let content = |bytes: &[u8]| Content::from_bytes(bytes);
    let image = |files: &[(&str, Content)]| {
        let mut image = Image::new();
        files.iter().for_each(|(name, content)| image.put(name, content.clone()));
        image
    };
    let mut hole = content(&[0; 8192]);
    hole.punch(0, 4096);
    let mut sealed = content(b"x");
    sealed.set_read_only(true);
    let images = [
        image(&[]),
        image(&[("a", content(b""))]),
        image(&[("b", content(b""))]),
        image(&[("a", content(b"")), ("b", content(b""))]),
        image(&[("ab", content(b""))]),
        image(&[("a", content(b"x"))]),
        image(&[("a", sealed)]),
        image(&[("a", content(b"x\0"))]),
        image(&[("a", content(&[0; 8192]))]),
        image(&[("a", hole)]),
    ];
    let prints: BTreeSet<_> = images.iter().map(Image::fingerprint).collect();
    assert_eq!(prints.len(), images.len());
}

#[derive(Debug, Clone)]
enum Step {
    Create(u8),
    Rename(u8, u8),
    Remove(u8),
    Write(u8, u16, u16),
    SetLen(u8, u16),
    Punch(u8, u16, u16),
    Sync(u8),
    SyncNames,
}

fn step() -> impl Strategy<Value = Step> {
    let name = || 0..4_u8;
    let at = || 0..20_000_u16;
    prop_oneof![
        2 => name().prop_map(Step::Create),
        1 => (name(), name()).prop_map(|(a, b)| Step::Rename(a, b)),
        1 => name().prop_map(Step::Remove),
        4 => (name(), at(), 0..9000_u16).prop_map(|(n, at, len)| Step::Write(n, at, len)),
        1 => (name(), at()).prop_map(|(n, len)| Step::SetLen(n, len)),
        1 => (name(), at(), at()).prop_map(|(n, at, len)| Step::Punch(n, at, len)),
        1 => name().prop_map(Step::Sync),
        1 => Just(Step::SyncNames),
    ]
}

/// Steps on files that are not there do nothing.
fn run(store: &SimStore, steps: &[Step]) {
    let file = |name: u8| store.open(&name.to_string(), Access::Write);
    for (fill, step) in (1..).zip(steps) {
        let _ = match *step {
            Step::Create(name) => store.create(&name.to_string()).map(drop),
            Step::Rename(a, b) => store.rename(&a.to_string(), &b.to_string()),
            Step::Remove(name) => store.remove(&name.to_string()),
            Step::Write(name, at, len) => {
                file(name).and_then(|f| f.write_at(at.into(), &vec![fill; len.into()]))
            }
            Step::SetLen(name, len) => file(name).and_then(|f| f.set_len(len.into())),
            Step::Punch(name, at, len) => file(name).and_then(|f| f.punch(at.into(), len.into())),
            Step::Sync(name) => file(name).and_then(|f| f.sync()),
            Step::SyncNames => store.sync_names(),
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Ties the three views of a history together: running it, replaying its log, and the crash
    /// state in which everything survived. And after all is synced there is one state.
    #[test]
    fn histories_agree(steps in proptest::collection::vec(step(), 1..25)) {
        let store = SimStore::new();
        run(&store, &steps);
        let (base, log) = (store.base(), store.log());
        prop_assert_eq!(&replay(&base, &log), &store.live_image());

        let bounds = Bounds { exhaustive: 4, random: 2, ..Bounds::default() };
        let mut complete = BTreeSet::new();
        let stats = all_crash_states(&base, &log, &bounds, &mut |state, image| {
            if image == replay(&base, &log[..state.point]) {
                complete.insert(state.point);
            }
        });
        prop_assert_eq!(complete.len(), log.len() + 1);
        prop_assert_eq!(stats.points, log.len() + 1);
        prop_assert_eq!(stats.sampled, 0);

        for name in store.names().unwrap() {
            store.open(&name, Access::Read).unwrap().sync().unwrap();
        }
        store.sync_names().unwrap();
        let mut last = Vec::new();
        let log = store.log();
        crash_states(&base, &log, log.len(), &bounds, &mut |_, image| last.push(image));
        prop_assert_eq!(last, vec![store.live_image()]);
    }

    /// A store made of the log of another goes on as that one does: same files, same faults at a
    /// power cut.
    #[test]
    fn a_log_can_be_taken_up(
        first in proptest::collection::vec(step(), 1..15),
        then in proptest::collection::vec(step(), 1..15),
    ) {
        let store = SimStore::new();
        run(&store, &first);
        let taken_up = SimStore::from_log(store.base(), store.log());
        prop_assert_eq!(taken_up.live_image(), store.live_image());

        run(&store, &then);
        run(&taken_up, &then);

        prop_assert_eq!(taken_up.live_image(), store.live_image());
        prop_assert_eq!(taken_up.base(), store.base());
        prop_assert_eq!(taken_up.log(), store.log());
    }

    /// The fast construction (shared pages, a walk that carries the durable part along) against the
    /// plain one: durable operations in order, then the survivors.
    #[test]
    fn fast_states_equal_plain_states(steps in proptest::collection::vec(step(), 1..20)) {
        let store = SimStore::new();
        run(&store, &steps);
        let (base, log) = (store.base(), store.log());
        all_crash_states(&base, &log, &Bounds::default(), &mut |state, image| {
            let kept = |at: usize| state.survivors.iter().any(|s| s.op == at);
            if state.survivors.iter().any(|s| s.part != Part::Whole)
                || !state.survivors.is_sorted_by_key(|s| s.op)
            {
                return;
            }
            let durable = |at: usize| {
                log[at..state.point].iter().any(|later| match &log[at] {
                    Op::Create { .. } | Op::Rename { .. } | Op::Remove { .. } => {
                        *later == Op::SyncNames
                    }
                    op => matches!(later, Op::Sync { file } if Some(*file) == op.file()),
                })
            };
            let past = |name_ops: bool, wanted: &dyn Fn(usize) -> bool| {
                drop_ops(&log[..state.point], |at, op| {
                    let names = matches!(
                        op, Op::Create { .. } | Op::Rename { .. } | Op::Remove { .. });
                    names != name_ops || !wanted(at)
                })
            };
            let mut all = past(false, &durable);
            all.extend(past(false, &|at| !durable(at) && kept(at)));
            all.extend(past(true, &durable));
            all.extend(past(true, &|at| !durable(at) && kept(at)));
            assert_eq!(image, replay(&base, &all), "{state}");
        });
    }
}
