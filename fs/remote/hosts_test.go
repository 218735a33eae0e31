package remote

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
)

// parsed is a host as a test writes it: where it is, and what is set.
type parsed struct {
	URL        string // "" is the namespace's own registry
	Pull, Tags bool
	CA         []string
	Client     [][2]string
	SkipVerify string
	Dial       time.Duration
	Header     http.Header
}

func show(list []host) (out []parsed) {
	for _, h := range list {
		p := parsed{Pull: h.pull, Tags: h.tags, CA: h.ca, Client: h.client, Dial: h.dial, Header: h.header}
		if h.at != (name.Registry{}) {
			p.URL = h.scheme + "://" + h.at.RegistryStr() + h.path
		}
		if h.skipVerify != nil {
			p.SkipVerify = map[bool]string{true: "yes", false: "no"}[*h.skipVerify]
		}
		out = append(out, p)
	}
	return out
}

func TestParseHosts(t *testing.T) {
	own := parsed{Pull: true, Tags: true}
	at := func(url string) parsed { return parsed{URL: url, Pull: true, Tags: true} }
	with := func(p parsed, change func(*parsed)) parsed { change(&p); return p }
	pullOnly := func(p *parsed) { p.Tags = false }
	for _, tt := range []struct {
		name, toml string
		want       []parsed
	}{
		{"empty", "", []parsed{own}},
		// The examples of containerd's docs/hosts.md.
		{"simple", "server = \"https://docker.io\"\n[host.\"https://registry-1.docker.io\"]\n  capabilities = [\"pull\", \"resolve\"]",
			[]parsed{at("https://registry-1.docker.io/v2"), at("https://index.docker.io/v2")}},
		{"local mirror", `
server = "https://registry-1.docker.io"    # Exclude this to not use upstream

[host."https://public-mirror.example.com"]
  capabilities = ["pull"]                  # Requires less trust, won't resolve tag to digest from this host
[host."https://docker-mirror.internal"]
  capabilities = ["pull", "resolve"]
  ca = "docker-mirror.crt"                 # Or absolute path /etc/containerd/certs.d/docker.io/docker-mirror.crt
`, []parsed{
			with(at("https://public-mirror.example.com/v2"), pullOnly),
			with(at("https://docker-mirror.internal/v2"), func(p *parsed) { p.CA = []string{"/d/docker-mirror.crt"} }),
			at("https://registry-1.docker.io/v2"),
		}},
		{"default mirror", "[host.\"https://registry.example.com\"]\n  capabilities = [\"pull\", \"resolve\"]",
			[]parsed{at("https://registry.example.com/v2"), own}},
		{"only the mirror", `server = "https://registry.example.com"`, []parsed{at("https://registry.example.com/v2")}},
		{"no verification", `
server = "https://registry-1.docker.io"
[host."http://192.168.31.250:5000"]
  capabilities = ["pull", "resolve", "push"]
  skip_verify = true
`, []parsed{with(at("http://192.168.31.250:5000/v2"), func(p *parsed) { p.SkipVerify = "yes" }), at("https://registry-1.docker.io/v2")}},
		{"many", `
ca = ["/etc/certs/test-1-ca.pem", "special.pem"]
[header]
  x-custom-1 = ["custom header part a","part b"]

[host."https://mirror.registry"]
  capabilities = ["pull"]
  ca = "/etc/certs/mirror.pem"
  skip_verify = false
  [host."https://mirror.registry".header]
    x-custom-2 = ["value1", "value2"]

[host."https://mirror-bak.registry/us"]
  capabilities = ["pull"]
  skip_verify = true

[host."http://mirror.registry"]
  capabilities = ["pull"]

[host."https://test-1.registry"]
  capabilities = ["pull", "resolve", "push"]
  client = [["/etc/certs/client.cert", "/etc/certs/client.key"],["/etc/certs/client.pem", ""]]

[host."https://test-2.registry"]
  client = "client.pem"
  dial_timeout = "1s"

[host."https://test-3.registry"]
  client = ["/etc/certs/client-1.pem", "/etc/certs/client-2.pem"]

[host."https://non-compliant-mirror.registry/v2/upstream"]
  capabilities = ["pull"]
  override_path = true
`, []parsed{
			{URL: "https://mirror.registry/v2", Pull: true, CA: []string{"/etc/certs/mirror.pem"}, SkipVerify: "no", Header: http.Header{"X-Custom-2": {"value1", "value2"}}},
			{URL: "https://mirror-bak.registry/us/v2", Pull: true, SkipVerify: "yes"},
			{URL: "http://mirror.registry/v2", Pull: true},
			with(at("https://test-1.registry/v2"), func(p *parsed) {
				p.Client = [][2]string{{"/etc/certs/client.cert", "/etc/certs/client.key"}, {"/etc/certs/client.pem", "/etc/certs/client.pem"}}
			}),
			with(at("https://test-2.registry/v2"), func(p *parsed) { p.Client, p.Dial = [][2]string{{"/d/client.pem", "/d/client.pem"}}, time.Second }),
			with(at("https://test-3.registry/v2"), func(p *parsed) {
				p.Client = [][2]string{{"/etc/certs/client-1.pem", "/etc/certs/client-1.pem"}, {"/etc/certs/client-2.pem", "/etc/certs/client-2.pem"}}
			}),
			with(at("https://non-compliant-mirror.registry/v2/upstream"), pullOnly),
			with(own, func(p *parsed) {
				p.CA, p.Header = []string{"/etc/certs/test-1-ca.pem", "/d/special.pem"}, http.Header{"X-Custom-1": {"custom header part a", "part b"}}
			}),
		}},

		{"order with tables below", "[host.b.header]\nx = \"1\"\n[host.a]\n[host.b]\ndial_timeout = \"1m\"",
			[]parsed{with(at("https://b/v2"), func(p *parsed) { p.Header, p.Dial = http.Header{"X": {"1"}}, time.Minute }), at("https://a/v2"), own}},
		{"inline", "[host]\n\"https://b\" = {capabilities = [\"pull\"]}\n\"https://a\" = {}", []parsed{with(at("https://b/v2"), pullOnly), at("https://a/v2"), own}},
		{"all inline", "host = {\"https://b\" = {}, \"https://a\" = {}}", []parsed{at("https://b/v2"), at("https://a/v2"), own}},
		{"dotted", "host.\"https://b\".skip_verify = false\nhost.a.dial_timeout=\"1s\"", []parsed{
			with(at("https://b/v2"), func(p *parsed) { p.SkipVerify = "no" }), with(at("https://a/v2"), func(p *parsed) { p.Dial = time.Second }), own}},
		{"no scheme, port, slash", `server = "a.example:5000/"`, []parsed{at("https://a.example:5000/v2")}},
		{"name begins with http", `server = "httpd.example"`, []parsed{at("https://httpd.example/v2")}},
		{"path", `server = "http://a.example/x//y/v2/"`, []parsed{at("http://a.example/x/y/v2")}},
		{"own path", "server = \"http://a.example/x/\"\noverride_path = true", []parsed{at("http://a.example/x")}},
		{"no path", "server = \"http://a.example\"\noverride_path = true", []parsed{at("http://a.example")}},
		{"unknown keys", "later = 1\n[host.a]\nlater = [1]\n[host.a.more]\nx = 1\n[even.more]", []parsed{at("https://a/v2"), own}},
		{"capabilities", "[host.a]\ncapabilities = []\n[host.b]\ncapabilities = [\"PULL\", \"referrers\"]\n[host.c]\ncapabilities = [\"push\"]\n[host.d]\ncapabilities = [\"resolve\"]",
			[]parsed{at("https://a/v2"), with(at("https://b/v2"), pullOnly), {URL: "https://c/v2"}, {URL: "https://d/v2"}, own}},
		{"capabilities of a server that is not named", `capabilities = ["push"]`, []parsed{own}},
		{"capabilities of a server", "server = \"a\"\ncapabilities = [\"pull\"]", []parsed{with(at("https://a/v2"), pullOnly)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			list, err := parseHosts([]byte(tt.toml), "/d")
			if err != nil {
				t.Fatal(err)
			}
			if d := gocmp.Diff(tt.want, show(list)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseHostsErrors(t *testing.T) {
	for toml, words := range map[string][]string{
		"a = 1\nserver = ":                               {"hosts.toml:2: ", "correct that line"},
		"\n\nserver = 5":                                 {"hosts.toml:3: "},
		"[host.a]\nskip_verify = \"yes\"":                {"hosts.toml:2: "},
		"[host.a]\n[host.a]":                             {"hosts.toml", "correct"},
		"[[host]]":                                       {"hosts.toml"},
		"[host.a]\nca = 5":                               {`host."a".ca = "5"`, "a file or a list of files"},
		"ca = [\"x\", 5]":                                {`hosts.toml: ca = "[x 5]"`},
		"client = [[\"x\"]]":                             {"client = ", `["CERT", "KEY"]`},
		"client = [[\"x\", 1]]":                          {"client = "},
		"client = 1":                                     {"client = "},
		"[host.a]\ncapabilities = [\"fly\"]":             {`host."a".capabilities = "fly"`, `"resolve"`},
		"dial_timeout = \"soon\"":                        {`dial_timeout = "soon"`, `such as "1s"`},
		"dial_timeout = \"-1s\"":                         {`dial_timeout = "-1s"`},
		"[host.a.header]\nx = 5":                         {`host."a".header."x"`},
		"[header]\n\"x y\" = \"\"":                       {`header."x y"`, "a header's name"},
		"[header]\nx = \"a\\nb\"":                        {`header."x"`, "line breaks"},
		"server = \"ftp://a\"":                           {`server = "ftp://a"`, "https://HOST"},
		"server = \"https://\"":                          {`server = "https://"`},
		"server = \"https://me:secret@a\"":               {"https://HOST"},
		"server = \"https://a?x=1\"":                     {"https://HOST"},
		"[host.\"https://a b\"]\n":                       {`host."https://a b": want "https://HOST`},
		"[host.\"\"]\n":                                  {`host."": want "https://HOST`},
		"[host.\"https://a:b:c/\"]\ncapabilities = []\n": {`host."https://a:b:c/": `},
	} {
		dir := t.TempDir()
		writeHosts(t, dir, "a.example", toml)
		_, err := readHosts(dir, "a.example")
		wantError(t, err, append(words, filepath.Join(dir, "a.example", "hosts.toml"))...)
	}
}

// TestContainerdsDocumentation parses every example in the documentation of containerd itself.
func TestContainerdsDocumentation(t *testing.T) {
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/containerd/containerd/v2").Output()
	if err != nil {
		t.Skipf("containerd's module cannot be found: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "docs", "hosts.md"))
	if err != nil {
		t.Skipf("containerd's documentation is not here: %v", err)
	}
	_, text, _ := strings.Cut(string(b), "# hosts.toml Content Description")
	blocks := strings.Split(text, "```")
	if len(blocks) < 20 {
		t.Fatalf("%d blocks, want more", len(blocks))
	}
	for i := 1; i < len(blocks); i += 2 {
		toml := strings.TrimPrefix(blocks[i], "toml")
		list, err := parseHosts([]byte(toml), "/d")
		if want := 1 + len(slices.Compact(hostsIn(toml))); err != nil || len(list) != want {
			t.Errorf("%d hosts, want %d; %v:\n%s", len(list), want, err, toml)
		}
	}
}

// hostsIn returns the hosts of a hosts.toml that is written as containerd's documentation does.
func hostsIn(toml string) (list []string) {
	for line := range strings.Lines(toml) {
		if h, ok := strings.CutPrefix(strings.TrimSpace(line), `[host."`); ok {
			h, _, _ = strings.Cut(h, `"`)
			list = append(list, h)
		}
	}
	return list
}

func TestFolders(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, at := range []string{a + "/docker.io", a + "/r.example_5000_", a + "/r.example:5000", a + "/[::1]:5000", a + "/s.example:1", b + "/t.example", b + "/_default", filepath.Dir(b)} {
		writeHosts(t, at, ".", `server = "here"`)
	}
	if err := os.Mkdir(a+"/empty.example", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ roots, namespace, want string }{
		{a, "docker.io", a + "/docker.io"},
		{a, "r.example:5000", a + "/r.example_5000_"}, // as containerd, which looks for this first
		{a, "[::1]:5000", a + "/[::1]:5000"},
		{a, "s.example:1", a + "/s.example:1"},
		{a, "s.example:2", ""},
		{a, "s.example", ""},
		{a + ":" + b, "t.example", b + "/t.example"},
		{a + ":" + b, "u.example", b + "/_default"},
		{b + ":" + a, "docker.io", b + "/_default"}, // of the first that has one
		{b, "..", b + "/_default"},
		{a, ".", ""},
		{"", "docker.io", ""},
		{a + "/missing", "docker.io", ""},
	} {
		got, err := readHosts(tt.roots, tt.namespace)
		from := ""
		if got != nil {
			from = filepath.Dir(got.from)
		}
		if err != nil || from != tt.want {
			t.Errorf("%s in %s: %q, want %q; %v", tt.namespace, tt.roots, from, tt.want, err)
		}
	}
	// A folder without anything hides _default, and is the registry as it would be without.
	if got, err := readHosts(a, "empty.example"); err != nil || !gocmp.Equal(show(got.list), []parsed{{Pull: true, Tags: true}}) {
		t.Errorf("empty folder: %+v, %v", got, err)
	}
}

func TestDockerCertificates(t *testing.T) {
	dir := t.TempDir()
	for _, f := range []string{"b.crt", "a.crt", "c.cert", "c.key", "d.cert", "e.key", "README"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	in := func(f string) string { return filepath.Join(dir, f) }
	want := []parsed{{Pull: true, Tags: true, CA: []string{in("a.crt"), in("b.crt")},
		Client: [][2]string{{in("c.cert"), in("c.key")}, {in("d.cert"), in("d.cert")}}}}
	for _, empty := range []bool{false, true} {
		if empty { // which containerd takes for none
			writeHosts(t, dir, ".", "")
		}
		got, err := readHostFolder(dir)
		if err != nil {
			t.Fatal(err)
		}
		if d := gocmp.Diff(want, show(got.list)); d != "" {
			t.Error(d)
		}
	}
}

// writeHosts writes DIR/FOLDER/hosts.toml.
func writeHosts(t *testing.T, dir, folder, toml string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, folder), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, folder, "hosts.toml"), []byte(toml), 0o600); err != nil {
		t.Fatal(err)
	}
}

func FuzzParseHosts(f *testing.F) {
	f.Add("server = \"https://a:1/x\"\n[host.\"http://b\"]\ncapabilities = [\"pull\"]\n[host.\"http://b\".header]\nx = [\"y\"]")
	f.Add("client = [[\"a\", \"\"], \"b\"]\nca = [\"c\"]\nskip_verify = true\ndial_timeout = \"1s\"")
	f.Add("host = {a = {}, \"b\" = {override_path = true}}")
	f.Add("[[host]]\n[host.a.b]\n[host]")
	f.Fuzz(func(t *testing.T, s string) {
		list, err := parseHosts([]byte(s), "/d")
		if err != nil {
			if !strings.HasPrefix(err.Error(), ":") {
				t.Errorf("error %q does not follow the name of a file", err)
			}
			return
		}
		if len(list) == 0 || len(list) > 1+len(s) {
			t.Fatalf("%d hosts", len(list))
		}
		for i, h := range list {
			unnamed := h.at == name.Registry{}
			if unnamed && i < len(list)-1 || !unnamed && (h.at.RegistryStr() == "" || h.scheme != "http" && h.scheme != "https") {
				t.Errorf("host %d: %+v", i, h)
			}
			if strings.HasSuffix(h.path, "/") || h.tags && !h.pull {
				t.Errorf("host %d: %+v", i, h)
			}
			for _, file := range slices.Concat(h.ca, slices.Concat(pairFiles(h.client)...)) {
				if !filepath.IsAbs(file) {
					t.Errorf("host %d: file %q", i, file)
				}
			}
		}
	})
}

func pairFiles(pairs [][2]string) (files [][]string) {
	for _, p := range pairs {
		files = append(files, p[:])
	}
	return files
}
