use super::*;

fn fails<T>(result: Result<T>) -> Option<Kind> {
    result.err().map(|e| {
        assert!(e.object().is_some() && e.to_string().contains("injected"), "{e}");
        e.kind()
    })
}

fn read(file: &Arc<dyn File>, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_at(offset, &mut bytes).unwrap();
    bytes
}

fn end_states(store: &SimStore) -> Vec<String> {
    let (mut states, log) = (Vec::new(), store.log());
    crash_states(&store.base(), &log, log.len(), &Bounds::default(), &mut |_, image| {
        states.push(letters(&image, "f"));
    });
    states.sort();
    states
}

#[test]
fn nth_call_fails_and_the_others_do_not() {
    let (store, file) = with_file(4);
    store.set_faults(
        Faults::none()
            .add(When::Nth(1), Fault::WriteIo)
            .add(When::Nth(3), Fault::WriteNoSpace)
            .add(When::Nth(0), Fault::PunchIo)
            .add(When::Nth(1), Fault::PunchUnsupported)
            .add(When::Nth(0), Fault::SetLenIo)
            .add(When::Nth(1), Fault::SetLenNoSpace)
            .add(When::Nth(0), Fault::ReadIo)
            .add(When::Nth(1), Fault::ReadShort)
            .add(When::Nth(0), Fault::CreateIo)
            .add(When::Nth(1), Fault::CreateNoSpace)
            .add(When::Nth(0), Fault::RenameIo)
            .add(When::Nth(0), Fault::RemoveIo)
            .add(When::Nth(0), Fault::SyncNamesIo)
            .add(When::Nth(1), Fault::SyncIo),
    );
    let write = || fails(file.write_at(0, &[1; 512]));
    let writes = [write(), write(), write(), write(), write()];
    assert_eq!(writes, [None, Some(Kind::Io), None, Some(Kind::NoSpace), None]);
    let punch = || fails(file.punch(0, 10));
    assert_eq!([punch(), punch(), punch()], [Some(Kind::Io), Some(Kind::Unsupported), None]);
    let set_len = || fails(file.set_len(4096));
    assert_eq!([set_len(), set_len(), set_len()], [Some(Kind::Io), Some(Kind::NoSpace), None]);
    let read = || fails(file.read_at(0, &mut [0; 9]));
    assert_eq!([read(), read(), read()], [Some(Kind::Io), Some(Kind::Corrupt), None]);
    let create = || fails(store.create("a"));
    assert_eq!([create(), create(), create()], [Some(Kind::Io), Some(Kind::NoSpace), None]);
    let rename = || fails(store.rename("a", "b"));
    assert_eq!([rename(), rename()], [Some(Kind::Io), None]);
    let remove = || fails(store.remove("b"));
    assert_eq!([remove(), remove()], [Some(Kind::Io), None]);
    let sync_names = || fails(store.sync_names());
    assert_eq!([sync_names(), sync_names()], [Some(Kind::Io), None]);
    let sync = || fails(file.sync());
    assert_eq!([sync(), sync(), sync()], [None, Some(Kind::Io), None]);

    let hits = store.hits();
    assert_eq!(hits.len(), 14);
    assert_eq!(hits[0], Hit { fault: Fault::WriteIo, name: "f".into(), at: 1 });
    assert_eq!(hits[0].to_string(), "WriteIo on \"f\" after 1 operations");
}

#[test]
fn rules_can_persist_and_be_bound_to_a_name() {
    let store = SimStore::new();
    let (a, b) = (store.create("a").unwrap(), store.create("b").unwrap());
    store.set_faults(Faults::none().add_on("b", When::From(1), Fault::SyncIo));

    for _ in 0..3 {
        assert_eq!(fails(a.sync()), None);
    }
    let synced = [b.sync(), b.sync(), b.sync()].map(fails);

    assert_eq!(synced, [None, Some(Kind::Io), Some(Kind::Io)]);
    store.set_faults(Faults::none());
    assert_eq!(fails(b.sync()), None);
}

#[test]
fn seeded_faults_repeat_and_have_the_asked_rate() {
    let run = |seed, one_in| {
        let (store, file) = with_file(1);
        let when = When::Seeded { seed, one_in };
        store.set_faults(Faults::none().add(when, Fault::WriteIo));
        (0..1000).map(|_| file.write_at(0, b"x").is_err()).collect::<Vec<_>>()
    };
    let count = |run: Vec<bool>| run.into_iter().filter(|failed| *failed).count();
    assert_eq!(run(7, 10), run(7, 10));
    assert_ne!(run(7, 10), run(8, 10));
    assert!((60..140).contains(&count(run(7, 10))));
    assert_eq!((count(run(7, 0)), count(run(7, 1))), (1000, 1000));
}

#[test]
fn failed_write_leaves_the_first_half_of_its_sectors() {
    for fault in [Fault::WriteIo, Fault::WriteNoSpace] {
        let (store, file) = with_file(5);
        store.set_faults(Faults::none().add(When::From(0), fault));
        file.write_at(512, &[b'A'; 4 * SECTOR]).unwrap_err();
        file.write_at(0, &[b'B'; SECTOR]).unwrap_err();
        assert_eq!(letters(&store.live_image(), "f"), ".AA..");
        assert_eq!(store.log_len(), 1);
    }
}

#[test]
fn failed_sync_loses_what_it_covered_for_ever() {
    let (store, file) = with_file(3);
    put(&file, 0, "A");
    file.sync().unwrap();
    put(&file, 1, "B");
    assert_eq!(end_states(&store), ["A..", "AB."]);
    store.set_faults(Faults::none().add(When::Nth(0), Fault::SyncIo));

    assert_eq!(fails(file.sync()), Some(Kind::Io));

    assert_eq!(read(&file, 512, 1), [0]);
    assert_eq!(letters(&store.live_image(), "f"), "A..");
    assert_eq!(end_states(&store), ["A.."]);
    put(&file, 2, "C");
    file.sync().unwrap();
    assert_eq!(end_states(&store), ["A.C"]);
    assert_eq!(replay(&store.base(), &store.log()), store.live_image());
}

/// The trap for programs that sync again after a failure: reads look right, the second sync
/// succeeds, the data is not there after the power cut.
#[test]
fn failed_sync_may_keep_up_appearances() {
    let (store, file) = with_file(3);
    put(&file, 0, "A");
    store.set_faults(Faults::none().add(When::Nth(0), Fault::SyncIoCached));

    assert_eq!(fails(file.sync()), Some(Kind::Io));
    file.sync().unwrap();

    assert_eq!(read(&file, 0, 1), b"A");
    assert_eq!(letters(&store.live_image(), "f"), "A..");
    assert_eq!(end_states(&store), ["..."]);

    // Written again and synced it is safe; a later visible failure falls back to just that.
    put(&file, 1, "B");
    file.sync().unwrap();
    assert_eq!(end_states(&store), [".B."]);
    store.set_faults(Faults::none().add(When::Nth(0), Fault::SyncIo));
    put(&file, 2, "C");
    assert_eq!(fails(file.sync()), Some(Kind::Io));
    assert_eq!(letters(&store.live_image(), "f"), ".B.");
    assert_eq!(end_states(&store), [".B."]);
    put(&file, 0, "A");
    file.sync().unwrap();
    assert_eq!(end_states(&store), ["AB."]);
    assert_eq!(replay(&store.base(), &store.log()), store.live_image());
}

#[test]
fn lost_and_misdirected_writes_are_acknowledged() {
    let mut image = Image::new();
    image.put("f", Content::from_bytes(&[b'.'; 3 * 4096]));
    let store = SimStore::from_image(image);
    let file = store.open("f", Access::Write).unwrap();
    let far = i64::MAX;
    store.set_faults(
        Faults::none()
            .add(When::Nth(0), Fault::WriteLost)
            .add(When::Nth(1), Fault::WriteMisdirected { pages: 1 })
            .add(When::Nth(2), Fault::WriteMisdirected { pages: -9 })
            .add(When::Nth(3), Fault::WriteMisdirected { pages: far }),
    );
    file.write_at(10, b"L").unwrap();
    file.write_at(4096 + 10, b"M").unwrap();
    file.write_at(4096 + 11, b"N").unwrap();
    file.write_at(12, b"O").unwrap();
    file.write_at(13, b"P").unwrap();
    file.sync().unwrap();

    assert_eq!(store.hits().len(), 4);
    assert_eq!(read(&file, 10, 4), b"...P");
    assert_eq!(read(&file, 4096 + 10, 2), b"..");
    assert_eq!(read(&file, 8192 + 10, 2), b"M.");
    assert_eq!(read(&file, 0, 1), b"N");
    assert_eq!(file.size().unwrap(), 3 * 4096);
}

#[test]
fn flipped_bit_is_in_the_buffer_and_not_in_the_file() {
    let (store, file) = with_file(1);
    store.set_faults(Faults::none().add(When::Nth(0), Fault::ReadFlip { bit: 11 + 16 }));
    let (first, second) = (read(&file, 0, 2), read(&file, 0, 2));
    assert_eq!((first, second), (vec![0, 8], vec![0, 0]));
}

#[test]
fn capacity_fills_up_and_frees() {
    let store = SimStore::new();
    let file = store.create("a").unwrap();
    store.set_faults(Faults::none().capacity(4 * 4096));
    file.set_len(1 << 30).unwrap();
    file.write_at(0, &[1; 3 * 4096]).unwrap();
    assert_eq!(store.space().unwrap(), Space { free: 4096, total: 4 * 4096 });

    // Two pages are wanted, one is left: the part that fits is written.
    assert_eq!(fails(file.write_at(5 * 4096 + 100, &[2; 4096])), Some(Kind::NoSpace));
    assert_eq!(read(&file, 6 * 4096 - 1, 2), [2, 0]);
    assert_eq!(fails(store.create("b").unwrap().write_at(0, b"x")), Some(Kind::NoSpace));
    // What has its pages can be overwritten.
    assert_eq!(fails(file.write_at(100, &[3; 4096])), None);

    file.punch(0, 4096).unwrap();
    assert_eq!(fails(file.write_at(1 << 20, &[4; 10])), None);
    assert_eq!(store.space().unwrap().free, 0);
    store.remove("a").unwrap();
    assert_eq!(store.space().unwrap().free, 4 * 4096);
    store.open("b", Access::Write).unwrap().write_at(0, b"x").unwrap();
}
