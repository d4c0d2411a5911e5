//! Requests that want more memory than there is, and conversations that want more context.

use super::*;

/// More sessions than there is memory for, if all were long.
#[test]
fn when_memory_is_short_idle_sessions_make_way_and_then_answers_end() {
    let (_folder, path) = model(Arch::Llama);
    let ask = |name: &str, first: u32, count: u32| Generate {
        session: Some(name.into()),
        ..greedy(&[first, 2, 3], count)
    };
    let mut wide = Serving::open(&[("m", &path)], 4, 1024, None, Limits::default());
    let expected = wide.ask(&ask("a", 1, 300)).tokens;
    let memory = least_memory(&path, 4, 1024);
    let mut narrow = Serving::open(&[("m", &path)], 4, 1024, Some(memory), Limits::default());
    let slots = narrow.scheduler.engine().pages_free();
    // One after the other all fit, because those before give up their pages; they go on all the same.
    let mut random = Random(3);
    let mut long = |name: &str| Generate {
        session: Some(name.into()),
        ..greedy(&prompt(&mut random, 703), 200)
    };
    for request in [ask("a", 1, 300), long("b"), long("c"), long("d")] {
        assert!(
            done(Reason::Length)(&narrow.ask(&request).ending),
            "{:?}",
            request.session
        );
    }
    let status = narrow.scheduler.status();
    let a = status.models[0]
        .sessions
        .iter()
        .find(|s| s.name.as_deref() == Some("a"));
    assert_eq!(
        a.map(|s| (s.tokens, s.computed)),
        Some((303, 0)),
        "its pages went, its words did not"
    );
    let mut talk = vec![1, 2, 3];
    talk.extend(&expected);
    let more = Generate {
        prompt: Prompt::Tokens(talk.clone()),
        ..ask("a", 1, 9)
    };
    assert_eq!(narrow.ask(&more).tokens, wide.ask(&more).tokens);

    // All at once do not fit: some end early and say why, and what they said is right.
    for serving in [&mut narrow, &mut wide] {
        for client in 0..4 {
            let request = greedy(&[client, 9], 900);
            serving.submit(tag(client, 0), &request).expect("room");
        }
        serving.finish();
    }
    let mut whole = 0;
    for client in 0..4 {
        let answer = &narrow.answers[&tag(client, 0)];
        let with_room = &wide.answers[&tag(client, 0)];
        assert!(done(Reason::Length)(&with_room.ending));
        assert!(with_room.tokens.starts_with(&answer.tokens));
        match answer.ending {
            Some(Ending::Done(Reason::Length, _)) => whole += 1,
            Some(Ending::Done(Reason::Context, _)) => assert!(answer.tokens.len() > 100),
            other => panic!("{other:?}"),
        }
    }
    assert!((1..4).contains(&whole), "{whole} were answered to the end");
    assert_eq!(all_slots(&mut narrow), slots);
}

/// Who lowers the budget wants the memory now; conversations that nobody goes on with at the moment can be computed again.
#[test]
fn a_smaller_budget_takes_idle_sessions_pages_but_no_answers() {
    let (_folder, path) = model(Arch::Llama);
    let mut random = Random(7);
    let mut long = || greedy(&prompt(&mut random, 900), 20);
    let asked = ["a", "b", "c"].map(|name| Generate {
        session: Some(name.into()),
        ..long()
    });
    let least = least_memory(&path, 4, 1024);
    let most = least + (1 << 20);
    let mut serving = Serving::open(&[("m", &path)], 4, 1024, Some(most), Limits::default());
    let answers = asked.each_ref().map(|request| serving.ask(request));
    assert!(
        answers
            .iter()
            .all(|answer| done(Reason::Length)(&answer.ending))
    );
    let computed = |serving: &Serving| -> Vec<usize> {
        let status = serving.scheduler.status();
        let sessions = status.models[0].sessions.iter();
        sessions.map(|session| session.computed).collect()
    };
    let before = computed(&serving);
    assert!(before.iter().all(|&computed| computed > 900), "{before:?}");
    // What cannot be takes nothing away.
    let refused = serving.scheduler.set_memory(least - (1 << 20)).err();
    assert_eq!(refused.map(|error| error.kind()), Some(Kind::Budget));
    assert_eq!(computed(&serving), before);

    serving
        .scheduler
        .set_memory(least)
        .expect("nobody is being answered");
    let after = computed(&serving);
    assert_eq!(
        (after[0], after[2]),
        (0, before[2]),
        "the oldest goes first"
    );
    let Prompt::Tokens(mut talk) = asked[0].prompt.clone() else {
        panic!("they are tokens");
    };
    talk.extend(&answers[0].tokens);
    let more = Generate {
        prompt: Prompt::Tokens(talk),
        ..asked[0].clone()
    };
    let mut wide = Serving::open(&[("m", &path)], 4, 1024, None, Limits::default());
    assert_eq!(serving.ask(&more).tokens, wide.ask(&more).tokens);

    // Answers under way keep what they have, whatever they hold.
    serving
        .scheduler
        .set_memory(most)
        .expect("no more than at the start");
    for client in 0..3 {
        serving.submit(tag(client, 0), &long()).expect("room");
    }
    while (0..3).any(|client| serving.answers[&tag(client, 0)].tokens.is_empty()) {
        serving.step();
    }
    let refused = serving.scheduler.set_memory(least).err();
    assert_eq!(refused.map(|error| error.kind()), Some(Kind::Budget));
    serving.finish();
    for client in 0..3 {
        let answer = &serving.answers[&tag(client, 0)];
        assert!(done(Reason::Length)(&answer.ending), "{:?}", answer.ending);
    }
}

/// Pages that nobody uses at present are worth less than weights that are read again and again.
#[test]
fn where_weights_stream_a_beginning_is_kept_for_the_next_request_only() {
    let (_folder, path) = model(Arch::Llama);
    let memory = least_memory(&path, 4, 512);
    let mut serving = Serving::open(&[("m", &path)], 4, 512, Some(memory), Limits::default());
    let slots = serving.scheduler.engine().pages_free();
    let beginning: Vec<u32> = (10..110).collect();
    let ask = |last: u32| greedy(&[&beginning[..], &[last]].concat(), 4);
    assert_eq!(serving.ask(&ask(1)).accepted, Some((101, 0)));
    assert_eq!(serving.ask(&ask(2)).accepted, Some((101, 100)));
    serving.ask(&greedy(&[7, 8, 9], 4));
    assert_eq!(serving.ask(&ask(3)).accepted, Some((101, 0)));
    assert_eq!(all_slots(&mut serving), slots);
}

/// An answer that goes on as long as its context lets it, beside a prompt that takes the rest of the memory.
fn a_prompt_makes_way(arch: Arch) {
    let (_folder, path) = model(arch);
    let memory = least_memory(&path, 3, 1024);
    let mut narrow = Serving::open(&[("m", &path)], 3, 1024, Some(memory), Limits::default());
    let slots = narrow.scheduler.engine().pages_free();
    let mut wide = Serving::open(&[("m", &path)], 3, 1024, None, Limits::default());
    let mut random = Random(5);
    let answer = greedy(&[1, 2, 3], 1000);
    let prompts: Vec<Generate> = [700, 900]
        .map(|tokens| greedy(&prompt(&mut random, tokens), 20))
        .into();
    narrow.submit(tag(0, 0), &answer).expect("room");
    for _ in 0..100 {
        narrow.step();
    }
    for (client, prompt) in (1..).zip(&prompts) {
        narrow.submit(tag(client, 0), prompt).expect("room");
    }
    narrow.finish();
    for (client, request) in (0..).zip([&answer].into_iter().chain(&prompts)) {
        let told = &narrow.answers[&tag(client, 0)];
        assert!(
            done(Reason::Length)(&told.ending),
            "{client}: {:?}",
            told.ending
        );
        assert_eq!(told.tokens, wide.ask(request).tokens, "{client}");
    }
    assert_eq!(all_slots(&mut narrow), slots);
}

#[test]
fn a_prompt_makes_way_for_an_answer_and_is_computed_again() {
    a_prompt_makes_way(Arch::Llama);
}

#[test]
fn so_it_does_where_some_layers_see_a_window_only() {
    a_prompt_makes_way(Arch::Gemma3);
}

/// The words of a turn may fit where the conversation that it begins does not; the others do not suffer for that.
#[test]
fn what_is_too_long_as_a_whole_ends_alone() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut serving = Serving::open(&[("m", &model)], 3, 256, None, Limits::default());
    let neighbour = greedy(&[1, 2, 3], 100);
    serving.submit(tag(0, 0), &neighbour).expect("room");
    serving.step();
    let long = Generate {
        session: Some("x".into()),
        system: Some("sea ".repeat(400)),
        sampling: Sampling::greedy(),
        ..Generate::new(Prompt::Text("Hi".into()))
    };
    serving.submit(tag(1, 0), &long).expect("its turn fits");
    serving.finish();
    let told = &serving.answers[&tag(1, 0)];
    assert_eq!(told.ending, Some(Ending::Failed(Kind::Budget)), "{told:?}");
    assert!(done(Reason::Length)(&serving.answers[&tag(0, 0)].ending));
    // In a session that holds something, its turn is all there is to it.
    let short = Generate {
        system: None,
        max_tokens: Some(3),
        ..long.clone()
    };
    serving.ask(&short);
    let more = Generate {
        max_tokens: Some(3),
        ..long
    };
    let told = serving.ask(&more);
    assert!(matches!(told.ending, Some(Ending::Done(..))), "{told:?}");
}

/// A conversation is left to its client's next requests, but not for ever if they come without a break.
#[test]
fn a_client_that_sends_ahead_keeps_nobody_waiting() {
    let (_folder, path) = model(Arch::Llama);
    let mut serving = Serving::open(&[("m", &path)], 1, 256, None, Limits::default());
    let ahead = Generate {
        session: Some("a".into()),
        ..greedy(&[1, 2, 3], 5)
    };
    for request in 0..2 {
        serving.submit(tag(0, request), &ahead).expect("room");
    }
    serving
        .submit(tag(1, 0), &greedy(&[7, 8, 9], 5))
        .expect("room");
    for request in 2..40 {
        serving.now += Duration::from_secs(1);
        serving.step();
        serving.submit(tag(0, request), &ahead).expect("room");
        if serving.answers[&tag(1, 0)].ending.is_some() {
            assert!(
                request > 5,
                "conversations were left to those who came later, for a while"
            );
            return;
        }
    }
    panic!("it waits for all that are sent meanwhile");
}
