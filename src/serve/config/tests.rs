//! Configurations that are sound, and what is said of others.

use super::*;

const SMALL: &str =
    "[[model]]\nname = \"a\"\npath = \"/a.gguf\"\n[[socket]]\npath = \"/run/a.sock\"\n";

fn parse(text: &str) -> Result<Config> {
    Config::parse(text, Path::new("airstream.toml"))
}

#[test]
fn the_default_file_is_sound_and_its_comments_tell_the_truth() {
    let text = include_str!("../../../cross/airstream.toml");
    let given = parse(text).expect("sound");
    assert_eq!(given.limits, Limits::default());
    // Every line that is commented out is a key with its default, or an example: all of them together work too.
    let whole: String = text
        .lines()
        .map(|line| {
            line.strip_prefix('#')
                .filter(|l| !l.starts_with(' '))
                .unwrap_or(line)
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let whole = parse(&whole).expect("sound with everything in it");
    assert_eq!(whole.limits, Limits::default());
    assert!(!whole.serials.is_empty() && whole.http.is_some() && whole.models.len() > 1);
}

#[test]
fn what_is_left_out_is_as_usual() {
    let config = parse(SMALL).expect("sound");
    assert_eq!(config.models[0].as_ref().priority, 1);
    assert_eq!(config.models[0].as_ref().activations, Precision::Bits12);
    assert_eq!(config.sockets[0].as_ref().mode, None);
    assert_eq!(Mode::default(), Mode(0o660));
    assert_eq!(config.model(None), Some(0));
    assert_eq!(config.model(Some("b")), None);
}

#[test]
fn errors_name_line_key_and_remedy() {
    let http = |rest: &str| format!("{SMALL}[http]\n{rest}\n");
    for (text, wanted) in [
        (
            format!("{SMALL}mod = \"0660\"\n"),
            "line 6: unknown field `mod`",
        ),
        (
            "memroy = \"2GiB\"\n".to_owned(),
            "line 1: unknown field `memroy`",
        ),
        (
            format!("memory = \"2XB\"\n{SMALL}"),
            "line 1: \"xb\" is no unit",
        ),
        (format!("memory = 5\n{SMALL}"), "at `memory`"),
        (String::new(), "there is no [[model]]"),
        (
            SMALL.replace("[[socket]]\npath = \"/run/a.sock\"\n", ""),
            "nobody could reach",
        ),
        (
            SMALL.replace("\"a\"", "\"a b\""),
            "line 1: model `name` \"a b\" is no name",
        ),
        (
            format!("{SMALL}{SMALL}"),
            "line 6: model `name` \"a\" is there twice",
        ),
        (
            SMALL.replace("name = \"a\"", "name = \"a\"\nload = \"demand\""),
            "no model has",
        ),
        (
            SMALL.replace("name = \"a\"", "name = \"a\"\npriority = 0"),
            "`priority` is 0",
        ),
        (
            SMALL.replace("name = \"a\"", "name = \"a\"\nactivations = 9"),
            "line 3: activations are rounded to 8 or 12 bits",
        ),
        (
            SMALL.replace("/run/a.sock", "a.sock"),
            "`path` a.sock is no path of a socket",
        ),
        (
            format!("{SMALL}mode = \"999\"\n"),
            "line 6: \"999\" is no file mode",
        ),
        (
            format!("memory = \"1GiB\"\nthreads = 0\n{SMALL}"),
            "line 2: `threads` is 0",
        ),
        (
            format!("threads = 128\n{SMALL}"),
            "line 1: `threads` is 128",
        ),
        (
            format!("{SMALL}[[socket]]\npath = \"/run/a.sock\"\n"),
            "line 6: /run/a.sock is there twice",
        ),
        (
            format!("{SMALL}{0}{0}", "[[serial]]\ndevice = \"/dev/ttyS0\"\n"),
            "line 8: /dev/ttyS0 is there twice",
        ),
        (
            http("listen = \"unix:/run/a.sock\""),
            "line 6: /run/a.sock is there twice",
        ),
        (
            http("listen = \"0.0.0.0:80\""),
            "open to the network without a token",
        ),
        (http("listen = \"localhost\""), "is no address"),
        (
            http("listen = \"127.0.0.1:80\"\ntoken = \"a b\""),
            "`token` is no token",
        ),
        (
            format!("{SMALL}[[serial]]\ndevice = \"/dev/ttyTHS1\"\nflow = \"software\"\n"),
            "line 6: `flow",
        ),
        (
            format!("{SMALL}[[serial]]\ndevice = \"/dev/ttyTHS1\"\nbaud = 115201\n"),
            "line 6: `baud` 115201 is no usual speed",
        ),
        (
            format!("{SMALL}[limits]\nclients = 0\n"),
            "line 6: `clients` is 0",
        ),
        (
            format!("{SMALL}[limits]\nprefill_slowdown = nan\n"),
            "`prefill_slowdown` is NaN",
        ),
        ("[[model\n".to_owned(), "line 1: "),
    ] {
        let error = parse(&text).expect_err(&text).to_string();
        assert!(error.starts_with("airstream.toml: "), "{error}");
        assert!(error.contains(wanted), "{error}\nis not {wanted}");
        assert!(error.contains("remedy: "), "{error}");
    }
}

#[test]
fn the_network_is_allowed_with_a_token_and_loopback_without() {
    for sound in [
        "listen = \"[::1]:8080\"",
        "listen = \"0.0.0.0:80\"\ntoken = \"abc\"",
        "listen = \"unix:/a\"",
    ] {
        parse(&format!("{SMALL}[http]\n{sound}\n")).expect(sound);
    }
}

#[test]
fn what_clients_can_hold_is_small_by_default_and_grows_with_the_limits() {
    let bytes = |rest: &str| {
        let config = parse(&format!("{SMALL}{rest}")).expect("sound");
        config.clients_bytes()
    };
    let usual = bytes("");
    assert!((4 << 20..10 << 20).contains(&usual), "{usual}");
    let mib = |n: u64| n << 20;
    assert!(bytes("[limits]\nrequest_bytes = \"1MiB\"\n") > mib(32 + 2 * 40));
    assert!(bytes("[limits]\nclients = 64\n") > usual + 32 * (64 << 10));
    assert!(bytes("[limits]\nqueue = 72\n") > usual + 40 * (128 << 10));
}
