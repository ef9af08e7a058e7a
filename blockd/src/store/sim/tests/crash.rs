use super::*;

/// The distinct states at the end of the log, as text made by `show`.
fn at_end(store: &SimStore, bounds: &Bounds, show: impl Fn(&Image) -> String) -> Vec<String> {
    let (mut states, log) = (Vec::new(), store.log());
    let stats = crash_states(&store.base(), &log, log.len(), bounds, &mut |_, image| {
        states.push(show(&image));
    });
    assert_eq!(stats.states, states.len());
    states.sort();
    states
}

fn of_f(store: &SimStore) -> Vec<String> {
    at_end(store, &Bounds::default(), |image| letters(image, "f"))
}

#[test]
fn every_subset_of_few_unsynced_writes_is_visited() {
    let (store, file) = with_file(3);
    for (at, letter) in ["A", "B", "C"].into_iter().enumerate() {
        put(&file, at as u64, letter);
    }

    assert_eq!(of_f(&store), ["...", "..C", ".B.", ".BC", "A..", "A.C", "AB.", "ABC"]);

    for count in 0..=7 {
        let (store, file) = with_file(7);
        (0..count).for_each(|at| put(&file, at, "X"));
        let mut seen = 0;
        let stats = crash_states(
            &store.base(),
            &store.log(),
            store.log_len(),
            &Bounds::default(),
            &mut |state, _| {
                assert_eq!(state.unsynced.len() as u64, count);
                seen += 1;
            },
        );
        let states = 1 << count;
        let expected = CrashStats { points: 1, states, duplicates: 0, sampled: 0 };
        assert_eq!((stats, seen), (expected, states));
    }
}

#[test]
fn regular_families_stand_in_for_many_unsynced_writes() {
    let (store, file) = with_file(8);
    (0..8).for_each(|at| put(&file, at, "X"));
    let bounds = Bounds { random: 0, ..Bounds::default() };

    let states = at_end(&store, &bounds, |image| letters(image, "f"));

    let all = "XXXXXXXX";
    let none = "........";
    let mut expected = BTreeSet::new();
    for i in 0..8 {
        expected.insert(format!("{}{}", &all[..i], &none[i..]));
        expected.insert(format!("{}{}", &none[..i], &all[i..]));
        expected.insert(format!("{}.{}", &all[..i], &all[i + 1..]));
        expected.insert(format!("{}X{}", &none[..i], &none[i + 1..]));
    }
    assert_eq!(expected.len(), 28);
    assert!(states.iter().eq(&expected), "{states:?}");

    let random = |seed| {
        let bounds = Bounds { random: 30, seed, ..Bounds::default() };
        at_end(&store, &bounds, |image| letters(image, "f"))
    };
    assert!(random(1).len() > 35);
    assert_eq!(random(1), random(1));
    assert_ne!(random(1), random(2));
    assert!(expected.iter().all(|state| random(3).contains(state)));
}

#[test]
fn large_families_are_sampled_with_both_ends_and_it_is_said() {
    let (store, file) = with_file(100);
    (0..100).for_each(|at| put(&file, at, "X"));
    let bounds = Bounds { random: 0, family: 10, ..Bounds::default() };
    let (mut prefixes, log) = (BTreeSet::new(), store.log());
    let mut visited = 0;

    let stats = crash_states(&store.base(), &log, 100, &bounds, &mut |state, _| {
        visited += 1;
        let ops: Vec<_> = state.survivors.iter().map(|s| s.op).collect();
        if ops.iter().copied().eq(0..ops.len()) {
            prefixes.insert(ops.len());
        }
    });

    assert_eq!((stats.sampled, stats.states), (1, visited));
    assert!(visited <= 40, "{visited}");
    assert!(prefixes.contains(&0) && prefixes.contains(&100), "{prefixes:?}");
    let all = crash_states(&store.base(), &log, 100, &Bounds::default(), &mut |_, _| {});
    assert_eq!(all.sampled, 0);
}

#[test]
fn sync_makes_earlier_writes_of_its_file_durable_and_nothing_else() {
    let (store, file) = with_file(3);
    put(&file, 0, "A");
    file.sync().unwrap();
    assert_eq!(of_f(&store), ["A.."]);
    put(&file, 1, "B");
    assert_eq!(of_f(&store), ["A..", "AB."]);
    let other = store.create("g").unwrap();
    other.sync().unwrap();
    store.sync_names().unwrap();
    assert_eq!(of_f(&store), ["A..", "AB."]);
    file.sync().unwrap();
    assert_eq!(of_f(&store), ["AB."]);

    let log = store.log();
    let at = |point: usize| {
        let mut states = BTreeSet::new();
        crash_states(&store.base(), &log, point, &Bounds::default(), &mut |state, image| {
            assert_eq!(state.point, point);
            states.insert(letters(&image, "f"));
        });
        states.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(at(0), ["..."]);
    assert_eq!(at(1), ["...", "A.."]);
    assert_eq!(at(2), ["A.."]);
}

#[test]
fn names_and_contents_are_durable_apart() {
    let show = |image: &Image| letters(image, "a");
    let store = SimStore::new();
    let file = store.create("a").unwrap();
    put(&file, 0, "A");
    // No file; an empty one; one with its length but not its bytes; all of it.
    let bounds = Bounds::default();
    assert_eq!(at_end(&store, &bounds, show), ["", "-", ".", "A"]);

    file.sync().unwrap();
    assert_eq!(at_end(&store, &bounds, show), ["-", "A"]);
    store.sync_names().unwrap();
    assert_eq!(at_end(&store, &bounds, show), ["A"]);

    let store = SimStore::new();
    let file = store.create("a").unwrap();
    store.sync_names().unwrap();
    put(&file, 0, "A");
    assert_eq!(at_end(&store, &bounds, show), ["", ".", "A"]);
}

#[test]
fn rename_survives_whole_or_not_at_all() {
    let mut image = Image::new();
    image.put("new", Content::from_bytes(b"N"));
    image.put("old", Content::from_bytes(b"O"));
    let store = SimStore::from_image(image);
    let show = |image: &Image| {
        let name = |name| format!("{name}={} ", letters(image, name));
        ["new", "old", "gone"].map(name).concat()
    };
    let bounds = Bounds::default();

    store.rename("new", "old").unwrap();
    assert_eq!(at_end(&store, &bounds, show), ["new=- old=N gone=- ", "new=N old=O gone=- "]);

    store.rename("old", "gone").unwrap();
    let states = at_end(&store, &bounds, show);
    // The second without the first: the file has its last name, and the other keeps its own.
    let second_only = "new=- old=O gone=N ";
    assert!(states.iter().any(|state| state == second_only), "{states:?}");
    assert_eq!(states.len(), 4);

    store.sync_names().unwrap();
    assert_eq!(at_end(&store, &bounds, show), ["new=- old=- gone=N "]);
    store.remove("gone").unwrap();
    assert_eq!(at_end(&store, &bounds, show), ["new=- old=- gone=- ", "new=- old=- gone=N "]);
}

#[test]
fn files_that_no_name_can_reach_add_no_states() {
    let store = SimStore::new();
    let file = store.create("a").unwrap();
    store.remove("a").unwrap();
    store.sync_names().unwrap();
    (0..5).for_each(|at| put(&file, at, "A"));

    let log = store.log();
    let stats = crash_states(&store.base(), &log, log.len(), &Bounds::default(), &mut |s, _| {
        assert!(s.unsynced.is_empty());
    });

    assert_eq!(stats, CrashStats { points: 1, states: 1, duplicates: 0, sampled: 0 });
}

#[test]
fn write_tears_between_its_halves() {
    let (store, file) = with_file(8);
    put(&file, 1, "ABCDE");
    assert_eq!(of_f(&store), ["........", "...CDE..", ".AB.....", ".ABCDE.."]);

    // Sectors count, not bytes: 20 bytes across a sector border tear there.
    let (store, file) = with_file(2);
    file.write_at(502, &[b'x'; 20]).unwrap();
    let show = |image: &Image| {
        String::from_utf8(image.get("f").unwrap().read(500, 24)).unwrap().replace('\0', ".")
    };
    assert_eq!(
        at_end(&store, &Bounds::default(), show),
        [
            "........................",
            "............xxxxxxxxxx..",
            "..xxxxxxxxxx............",
            "..xxxxxxxxxxxxxxxxxxxx..",
        ]
    );

    // And 512 bytes in one sector do not.
    let (store, file) = with_file(2);
    put(&file, 1, "A");
    assert_eq!(of_f(&store), ["..", ".A"]);
}

#[test]
fn torn_writes_come_with_all_and_with_none_of_the_others() {
    let (store, file) = with_file(4);
    put(&file, 0, "AA");
    put(&file, 2, "B");
    assert_eq!(of_f(&store), ["....", "..B.", ".A..", ".AB.", "A...", "A.B.", "AA..", "AAB."]);
}

#[test]
fn overlapping_writes_also_land_in_reversed_order() {
    let (store, file) = with_file(1);
    file.write_at(0, &[b'A'; 300]).unwrap();
    file.write_at(200, &[b'B'; 312]).unwrap();
    let show = |image: &Image| {
        let bytes = image.get("f").unwrap().read(0, 512);
        [0, 250, 400].map(|at| char::from(bytes[at].max(b'.'))).iter().collect()
    };
    assert_eq!(at_end(&store, &Bounds::default(), show), ["...", ".BB", "AA.", "AAB", "ABB"]);

    // Not across a sync, which orders them.
    let (store, file) = with_file(1);
    file.write_at(0, &[b'A'; 300]).unwrap();
    file.sync().unwrap();
    file.write_at(200, &[b'B'; 312]).unwrap();
    assert_eq!(at_end(&store, &Bounds::default(), show), ["AA.", "ABB"]);
}

#[test]
fn reversed_pairs_come_with_all_and_with_none_of_the_others() {
    let (store, file) = with_file(2);
    file.write_at(0, &[b'A'; 300]).unwrap();
    file.write_at(200, &[b'B'; 312]).unwrap();
    put(&file, 1, "C");
    let mut reversed = BTreeSet::new();
    let log = store.log();
    crash_states(&store.base(), &log, 3, &Bounds::default(), &mut |state, image| {
        let bytes = image.get("f").unwrap().read(0, 1024);
        if (bytes[250], bytes[400]) == (b'A', b'B') {
            let ops: Vec<_> = state.survivors.iter().map(|s| s.op).collect();
            reversed.insert((ops, bytes[600]));
        }
    });
    assert_eq!(reversed, BTreeSet::from([(vec![1, 0, 2], b'C'), (vec![1, 0], 0)]));
}

#[test]
fn extending_write_may_leave_its_length_only() {
    let (store, file) = with_file(1);
    put(&file, 2, "A");
    assert_eq!(of_f(&store), [".", "...", "..A"]);
    file.sync().unwrap();
    file.set_len(512).unwrap();
    assert_eq!(of_f(&store), [".", "..A"]);
}

#[test]
fn punch_and_cut_are_as_volatile_as_writes() {
    let (store, file) = with_file(2);
    put(&file, 0, "AB");
    file.sync().unwrap();
    file.punch(512, 512).unwrap();
    assert_eq!(of_f(&store), ["A.", "AB"]);
    file.set_len(512).unwrap();
    assert_eq!(of_f(&store), ["A", "A.", "AB"]);
    // A cut that is lost brings the old bytes back under a later growth.
    file.set_len(1024).unwrap();
    assert_eq!(of_f(&store), ["A", "A.", "AB"]);
}

#[test]
fn read_only_mark_is_durable_at_once() {
    let (store, file) = with_file(1);
    file.set_read_only(true).unwrap();
    put(&file, 0, "A");
    let show = |image: &Image| {
        format!("{} {}", letters(image, "f"), image.get("f").unwrap().is_read_only())
    };
    assert_eq!(at_end(&store, &Bounds::default(), show), [". true", "A true"]);
}

#[test]
fn crash_state_says_what_it_is() {
    let store = SimStore::new();
    let file = store.create("seg").unwrap();
    file.write_at(0, &[1; 4096]).unwrap();
    file.write_at(8192, &[2; 512]).unwrap();
    let (log, mut texts) = (store.log(), BTreeSet::new());

    crash_states(&store.base(), &log, 3, &Bounds::default(), &mut |state, _| {
        texts.insert(state.to_string());
    });

    let text = "power cut after 3 of 3 operations (the last was: write #0 8192+512); not durable: \
        [0: create seg as #0] [1: write #0 0+4096] [2: write #0 8192+512]; \
        survived, in this order: 0 1 first half 2; files: #0=seg";
    assert!(texts.contains(text), "{texts:#?}");
    assert!(texts.iter().any(|text| text.contains("0 1 2 length only;")));
}

/// A two-step commit: data, sync, then a header that promises it, sync.
fn commit() -> SimStore {
    let (store, file) = with_file(2);
    put(&file, 1, "D");
    file.sync().unwrap();
    put(&file, 0, "H");
    file.sync().unwrap();
    store
}

/// States in which the header promises data that is not there.
fn broken_promises(base: &Image, log: &[Op]) -> usize {
    let mut broken = 0;
    all_crash_states(base, log, &Bounds::default(), &mut |_, image| {
        broken += usize::from(letters(&image, "f") == "H.");
    });
    broken
}

#[test]
fn forgotten_sync_and_swapped_writes_are_found() {
    let store = commit();
    let (base, log) = (store.base(), store.log());
    assert_eq!(broken_promises(&base, &log), 0);

    let forgot = drop_syncs(&log, |at, _| at == 1);
    assert_eq!((forgot.len(), &forgot[1]), (4, &Op::Nothing));
    assert_eq!(broken_promises(&base, &forgot), 1);

    assert!(broken_promises(&base, &swap(&log, 0, 2)) > 0);
    assert_eq!(broken_promises(&base, &swap(&log, 1, 3)), 0);
    assert_eq!(drop_syncs(&log, |_, _| false), log);
    let lost = drop_ops(&log, |_, op| matches!(op, Op::Write { offset: 512, .. }));
    assert!(broken_promises(&base, &lost) > 0);
    assert_eq!(replay(&base, &forgot), replay(&base, &log));
}
