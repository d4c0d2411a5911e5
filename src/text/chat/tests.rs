//! Templates with what real ones use, and what becomes of a system message.

use super::{ChatTemplate, Message};

fn render(source: &str, messages: &[Message]) -> String {
    ChatTemplate::new(source, "<s>", "</s>")
        .render(messages, true)
        .unwrap()
}

fn user(content: &str) -> Vec<Message> {
    vec![Message::new("user", content)]
}

#[test]
fn what_real_templates_use() {
    let source = "\
{%- set ns = namespace(found=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif -%}
    {%- if message.content.startswith('x') and not ns.found %}
        {%- set ns.found = true -%}
    {%- endif -%}
    {{- message.content.strip().split('|')[-1] | trim | upper }}
    {%- if tools %}never{% endif %}
    {%- if loop.last %}{% break %}{% endif -%}
{%- endfor -%}
{{- '!' if ns.found else '?' }} {{ 'a' in ['a', 'b'] }} {{ messages | length }} {{ messages[::-1][0].role -}}
{%- if documents is defined %}never{% endif %}{% if messages[0].content is string %}.{% endif %}";
    let mut messages = user("x |  hi ");
    messages.insert(0, Message::new("tool", "dropped"));
    assert_eq!(render(source, &messages), "HI! True 2 user.");
}

#[test]
fn json_is_pythons() {
    let message = &user("<\"\u{e9}\">")[0];
    assert_eq!(message.role, "user");
    let line = render(
        "{{ [messages[0].content, {'a': 1}, none] | tojson }}",
        &user("<\"\u{e9}\">"),
    );
    assert_eq!(line, "[\"<\\\"\u{e9}\\\">\", {\"a\": 1}, null]");
    let lines = render("{{ {'a': [1, true]} | tojson(indent=2) }}", &user(""));
    assert_eq!(lines, "{\n  \"a\": [\n    1,\n    true\n  ]\n}");
}

#[test]
fn dates_are_of_today() {
    let year = render("{{ strftime_now('%Y') }}", &user(""));
    assert!(year.parse::<u32>().is_ok_and(|year| year >= 2024), "{year}");
}

#[test]
fn a_template_that_raises_is_an_error_with_its_words() {
    let source =
        "{% if messages[0].content == 'bad' %}{{ raise_exception('must alternate') }}{% endif %}";
    let template = ChatTemplate::new(source, "", "");
    let error = template.render(&user("bad"), true).unwrap_err().to_string();
    assert!(
        error.contains("must alternate") && error.contains("remedy"),
        "{error}"
    );
    assert!(template.render(&user("good"), true).is_ok());
}

#[test]
fn one_that_is_no_jinja_says_so_when_it_is_used_and_not_before() {
    let huge = "a".repeat(super::SOURCE_BYTES_MAX + 1);
    for (source, why) in [
        ("{% for %}", "unexpected end of block"),
        (&huge, "allowed are 262144"),
    ] {
        let error = ChatTemplate::new(source, "", "").render(&user("U"), true);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("raw text"), "{error}");
    }
}

#[test]
fn marks_for_training_are_left_out_with_the_spaces_that_they_take() {
    let marked = "a {%- generation -%} {{ messages[0].content }} {% endgeneration %} b{% set generation = 1 %}";
    assert_eq!(render(marked, &user("U")), "aU  b");
}

#[test]
fn a_template_that_goes_on_for_ever_is_an_error() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let when_asked = format!("{{% if messages[0].content == 'bad' %}}{endless}{{% endif %}}");
    let template = ChatTemplate::new(&when_asked, "", "");
    let error = template.render(&user("bad"), true).unwrap_err();
    assert!(error.what().contains("fuel"), "{error}");
    // Fuel is of one rendering, not of all.
    let long = vec![Message::new("user", "word ".repeat(1000)); 100];
    let echo = ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}", "", "");
    for _ in 0..100 {
        assert_eq!(echo.render(&long, true).unwrap().len(), 500_000);
    }
}

#[test]
fn a_system_message_is_folded_where_there_is_no_place_for_it() {
    let dropping =
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
    let refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}\
        [{{ m.role }}:{{ m.content }}]{% endfor %}";
    let taking = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
    let mut messages = user("U");
    messages.insert(0, Message::new("system", "S"));
    messages.push(Message::new("assistant", "A"));
    for source in [dropping, refusing] {
        assert_eq!(render(source, &messages), "[user:S\n\nU][assistant:A]");
        assert_eq!(render(source, &messages[..1]), "[user:S]");
    }
    assert_eq!(render(taking, &messages), "[system:S][user:U][assistant:A]");
}
