package credentials

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// clean takes away what the machine's own docker configuration would answer, and returns a folder for another.
func clean(t testing.TB) string {
	dir := t.TempDir()
	t.Setenv("HOME", t.TempDir())
	t.Setenv("DOCKER_CONFIG", dir)
	for _, v := range []string{"REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, t.TempDir())
	}
	return dir
}

func open(t testing.TB, dir string) *Keychain {
	t.Helper()
	k, err := Open(dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	must(t, err)
	return k
}

func login(user string) authn.AuthConfig {
	return authn.AuthConfig{Username: user, Password: user + "'s password"}
}

// config returns what a has, as a test compares it.
func config(t testing.TB, a authn.Authenticator, err error) authn.AuthConfig {
	t.Helper()
	must(t, err)
	c, err := authn.Authorization(t.Context(), a)
	must(t, err)
	return *c
}

func resolve(t testing.TB, k *Keychain, repository string) authn.AuthConfig {
	t.Helper()
	repo, err := name.NewRepository(repository)
	must(t, err)
	a, err := authn.Resolve(t.Context(), k, repo)
	return config(t, a, err)
}

// candidates returns the user names of all candidates, "error" for an error.
func candidates(t testing.TB, k *Keychain, target authn.Resource) (users []string) {
	t.Helper()
	for a, err := range k.Candidates(t.Context(), target) {
		if err != nil {
			users = append(users, "error")
			continue
		}
		users = append(users, config(t, a, nil).Username)
	}
	return users
}

func TestRemember(t *testing.T) {
	clean(t)
	digest := "@sha256:" + strings.Repeat("0f", 32)
	token := authn.AuthConfig{IdentityToken: "identity"}
	latin := authn.AuthConfig{Username: "j\xfcrgen", Password: "gr\xfc\xdfe:\t "}
	for _, test := range []struct {
		image, repository string
		give, want        authn.AuthConfig
	}{
		{"debian", "docker.io/library/debian", login("a"), login("a")},
		{"docker.io/library/debian:12", "debian", login("a"), login("a")},
		{"index.docker.io/me/app" + digest, "me/app", login("a"), login("a")},
		{"r.example.com/app:1" + digest, "r.example.com/app", login("a"), login("a")},
		{"r.example.com:5000/a/b/c", "r.example.com:5000/a/b/c", login("a"), login("a")},
		{"localhost/app", "localhost/app", token, token},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{RegistryToken: "bearer"}, authn.AuthConfig{RegistryToken: "bearer"}},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{Password: "p"}, authn.AuthConfig{Password: "p"}},
		{"r.example.com/app", "r.example.com/app", latin, latin},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte("u:p:q"))}, authn.AuthConfig{Username: "u", Password: "p:q"}},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{Auth: base64.RawStdEncoding.EncodeToString([]byte("u:p:q"))}, authn.AuthConfig{Username: "u", Password: "p:q"}},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{Username: "v", Auth: "nonsense"}, authn.AuthConfig{Username: "v"}},
		// Nothing is given, and nothing is there.
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{}, authn.AuthConfig{}},
		{"r.example.com/app", "r.example.com/app", authn.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte(":"))}, authn.AuthConfig{}},
	} {
		dir := filepath.Join(t.TempDir(), "credentials")
		k := open(t, dir)
		must(t, k.Remember(test.image, test.give))
		if got := resolve(t, k, test.repository); got != test.want {
			t.Errorf("%s: %q for %s, want %q", test.image, got, test.repository, test.want)
		}
		if got := resolve(t, open(t, dir), test.repository); got != test.want {
			t.Errorf("%s, opened again: %q for %s, want %q", test.image, got, test.repository, test.want)
		}
		if got := resolve(t, k, "other.example.com/app"); got != (authn.AuthConfig{}) {
			t.Errorf("%s: another host is answered %q", test.image, got)
		}
	}
}

// TestRefused: what is refused is not kept, takes nothing away, and is in no error and no log.
func TestRefused(t *testing.T) {
	clean(t)
	const secret = "GEHEIM"
	var log bytes.Buffer
	dir := t.TempDir()
	k, err := Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	must(t, k.Remember("r.example.com/app", login("a")))
	for _, a := range []authn.AuthConfig{
		{Username: "u", Password: secret + "\n"},
		{Username: "u", Password: "\r" + secret},
		{Username: secret + "\x00", Password: "p"},
		{IdentityToken: secret + "\n" + secret},
		{RegistryToken: secret + "\x00"},
		{Auth: base64.StdEncoding.EncodeToString([]byte("u:" + secret + "\n"))},
		{Auth: base64.StdEncoding.EncodeToString([]byte(secret))},
		{Auth: secret + "!"},
		{Username: "u", Password: strings.Repeat(secret, maxSize/len(secret)+1)},
	} {
		err := k.Remember("r.example.com/app", a)
		if err == nil {
			t.Errorf("%.50q is kept", a)
		} else if strings.Contains(err.Error(), secret) || !strings.Contains(err.Error(), "r.example.com/app") {
			t.Errorf("a bad error: %v", err)
		}
	}
	for _, image := range []string{"", "UPPER/case", "a@sha256:1", "http://r.example.com/app", "a b"} {
		if err := k.Remember(image, authn.AuthConfig{Username: "u", Password: secret}); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("image %q: %v", image, err)
		}
	}
	// A disk that refuses.
	must(t, os.RemoveAll(dir))
	err = k.Remember("r.example.com/app2", authn.AuthConfig{Username: "u", Password: secret})
	if err == nil || strings.Contains(err.Error(), secret) {
		t.Errorf("without its folder: %v", err)
	}
	if got := resolve(t, k, "r.example.com/app2").Password; got != secret {
		t.Errorf("what could not be written is not used: %q", got)
	}
	if got := resolve(t, k, "r.example.com/app"); got != login("a") {
		t.Errorf("%q, want what was given first", got)
	}
	if strings.Contains(log.String(), secret) {
		t.Errorf("the log has a password:\n%s", &log)
	}
}

// TestOrder: docker's configuration by way of a credential helper, and what was given.
func TestOrder(t *testing.T) {
	docker := clean(t)
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	asked := filepath.Join(bin, "asked")
	must(t, os.WriteFile(filepath.Join(bin, "docker-credential-vault"), []byte(`#!/bin/sh
read server
echo "$1 $server" >> `+asked+`
case $server in
r.example.com) echo '{"ServerURL":"r.example.com","Username":"helper","Secret":"h"}';;
*) echo "credentials not found in native keychain"; exit 1;;
esac
`), 0o755))
	must(t, os.WriteFile(filepath.Join(docker, "config.json"), []byte(`{
		"auths": {"plain.example.com": {"auth": "`+base64.StdEncoding.EncodeToString([]byte("file:f"))+`"}},
		"credHelpers": {"r.example.com": "vault", "broken.example.com": "missing"}
	}`), 0o600))

	k := open(t, t.TempDir())
	repo := func(s string) authn.Resource {
		r, err := name.NewRepository(s)
		must(t, err)
		return r
	}
	host, err := name.NewRegistry("r.example.com")
	must(t, err)
	want := func(target authn.Resource, users ...string) {
		t.Helper()
		if got := candidates(t, k, target); !slices.Equal(got, users) {
			t.Errorf("%s: %q, want %q", target, got, users)
		}
		a, err := k.Resolve(target)
		if users[0] == "error" && users[1] == "" {
			if err == nil || !strings.Contains(err.Error(), target.RegistryStr()) {
				t.Errorf("%s: resolved with the error %v", target, err)
			}
			return
		}
		users = slices.DeleteFunc(users, func(u string) bool { return u == "error" })
		if got := config(t, a, err).Username; got != users[0] {
			t.Errorf("%s: resolved to %q, want %q", target, got, users[0])
		}
	}
	want(repo("r.example.com/a"), "helper", "")
	want(repo("plain.example.com/a"), "file", "")
	want(repo("other.example.com/a"), "")
	want(repo("broken.example.com/a"), "error", "")

	for i := range 5 {
		must(t, k.Remember(fmt.Sprintf("r.example.com/other%d", i), login(fmt.Sprint("o", i))))
	}
	must(t, k.Remember("r.example.com/other5", login("o4"))) // the same again
	want(repo("r.example.com/a"), "helper", "o4", "o3", "o2", "")
	want(host, "helper", "o4", "o3", "o2", "")
	want(repo("r.example.com/other0"), "o0", "helper", "o4", "o3", "o2", "")
	must(t, k.Remember("r.example.com/other0:new", login("n")))
	want(repo("r.example.com/other0"), "n", "helper", "o4", "o3", "o2", "")
	want(repo("r.example.com/a"), "helper", "n", "o4", "o3", "")

	must(t, k.Remember("broken.example.com/b", login("b")))
	want(repo("broken.example.com/a"), "error", "b", "")
	want(repo("broken.example.com/b"), "b", "error", "")

	// Pulls that are under way count for their own repository only, and all of them do.
	one, err := k.try("r.example.com/other0", login("t1"))
	must(t, err)
	two, err := k.try("r.example.com/other0", login("t2"))
	must(t, err)
	want(repo("r.example.com/other0"), "t2", "t1", "n", "helper", "o4", "o3", "o2", "")
	want(repo("r.example.com/a"), "helper", "n", "o4", "o3", "")
	must(t, two(false))
	want(repo("r.example.com/other0"), "t1", "n", "helper", "o4", "o3", "o2", "")
	must(t, one(true))
	want(repo("r.example.com/other0"), "t1", "helper", "o4", "o3", "o2", "")

	// Of two that succeed the one that began last is newer, whichever ends last.
	one, err = k.try("r.example.com/other0", login("s1"))
	must(t, err)
	two, err = k.try("r.example.com/other0", login("s2"))
	must(t, err)
	must(t, two(true))
	must(t, one(true))
	want(repo("r.example.com/other0"), "s2", "helper", "o4", "o3", "o2", "")
	k = open(t, k.dir)
	want(repo("r.example.com/other0"), "s2", "helper", "o4", "o3", "o2", "")

	// What is the same comes once, where it stands first.
	must(t, k.Remember("r.example.com/other0", authn.AuthConfig{Username: "helper", Password: "h"}))
	want(repo("r.example.com/other0"), "helper", "o4", "o3", "o2", "")
	must(t, k.Remember("r.example.com/other1", login("o4")))
	want(repo("r.example.com/other1"), "o4", "helper", "o3", "o2", "")

	// Nobody runs a helper for what is known.
	must(t, os.Truncate(asked, 0))
	resolve(t, k, "r.example.com/other1")
	if b, err := os.ReadFile(asked); err != nil || len(b) > 0 {
		t.Errorf("the credential helper was asked %q, %v", b, err)
	}
}

func TestModes(t *testing.T) {
	clean(t)
	defer unix.Umask(unix.Umask(0))
	dir := filepath.Join(t.TempDir(), "a", "credentials")
	must(t, os.MkdirAll(dir, 0o777))
	must(t, open(t, dir).Remember("r.example.com/app", login("a")))
	must(t, open(t, dir).Remember("r.example.com/app", login("b")))
	count := 0
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		fi, err := d.Info()
		must(t, err)
		want := os.FileMode(0o600)
		if d.IsDir() {
			want = fs.ModeDir | 0o700
		}
		if fi.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, fi.Mode(), want)
		}
		count++
		return nil
	}))
	if count != 2 {
		t.Errorf("there are %d files, want the folder and one", count)
	}
}

func TestDamaged(t *testing.T) {
	clean(t)
	dir := t.TempDir()
	k := open(t, dir)
	for _, r := range []string{"good", "empty", "cut", "swapped", "long", "nothing", "newline"} {
		must(t, k.Remember("r.example.com/"+r, login(r)))
	}
	file := func(r string) string { return k.path("r.example.com/" + r) }
	good, err := os.ReadFile(file("good"))
	must(t, err)
	must(t, os.WriteFile(file("empty"), nil, 0o600))
	must(t, os.WriteFile(file("cut"), good[:len(good)/2], 0o600))
	must(t, os.WriteFile(file("swapped"), good, 0o600))
	must(t, os.WriteFile(file("long"), append(good, bytes.Repeat([]byte(" "), maxFile)...), 0o600))
	must(t, os.WriteFile(file("nothing"), []byte(`{"repository":"r.example.com/nothing"}`), 0o600))
	must(t, os.WriteFile(file("newline"), []byte(`{"repository":"r.example.com/newline","password":"R0VIRUlNCg=="}`), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "notes.txt"), []byte("GEHEIM"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, unfinished+"1"), good[:10], 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "folder"), 0o700))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))

	var log bytes.Buffer
	k, err = Open(dir, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	if len(k.kept) != 1 || resolve(t, k, "r.example.com/good") != login("good") {
		t.Errorf("of the damaged folder %d are left, want the good one", len(k.kept))
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 9 {
		t.Errorf("%d warnings, want 9:\n%s", n, &log)
	}
	for _, secret := range []string{"GEHEIM", "R0VIRUlN", "good's"} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log has %q:\n%s", secret, &log)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, unfinished+"1")); err == nil {
		t.Error("a file that was not finished is still there")
	}
	must(t, k.Remember("r.example.com/cut", login("cut")))
	if got := resolve(t, open(t, dir), "r.example.com/cut"); got != login("cut") {
		t.Errorf("%q in the place of a damaged file", got)
	}
}

// rewind makes what was given for a repository older, on disk.
func rewind(t testing.TB, k *Keychain, repository string, by time.Duration) {
	t.Helper()
	g := *k.kept[repository]
	g.at = g.at.Add(-by)
	must(t, k.write(&g))
}

func TestBounds(t *testing.T) {
	clean(t)
	dir := t.TempDir()
	k := open(t, dir)
	k.limit = 3
	users := func() (list []string) {
		for _, g := range k.kept {
			list = append(list, g.config.Username)
		}
		slices.Sort(list)
		return list
	}
	files := func() int {
		list, err := os.ReadDir(dir)
		must(t, err)
		return len(list)
	}
	for _, u := range []string{"a", "b", "c"} {
		must(t, k.Remember("r.example.com/"+u, login(u)))
	}
	must(t, k.Remember("r.example.com/a", login("a2"))) // now b is the oldest
	must(t, k.Remember("r.example.com/d", login("d")))
	if got := users(); !slices.Equal(got, []string{"a2", "c", "d"}) || files() != 3 {
		t.Errorf("kept are %q in %d files", got, files())
	}
	// The order outlives the process.
	rewind(t, k, "r.example.com/d", time.Hour)
	k = open(t, dir)
	k.limit = 3
	must(t, k.Remember("r.example.com/e", login("e")))
	if got := users(); !slices.Equal(got, []string{"a2", "c", "e"}) || files() != 3 {
		t.Errorf("kept are %q in %d files", got, files())
	}
	// A clock that was wrong makes nothing last forever.
	rewind(t, k, "r.example.com/c", -1000*time.Hour)
	k = open(t, dir)
	k.limit = 3
	for _, u := range []string{"x", "y", "z"} {
		must(t, k.Remember("r.example.com/"+u, login(u)))
	}
	if got := users(); !slices.Equal(got, []string{"x", "y", "z"}) || files() != 3 {
		t.Errorf("kept are %q in %d files", got, files())
	}
}

// TestClock: what is given later is newer, also when the clock was set back: in here it is the year 2000.
func TestClock(t *testing.T) {
	clean(t)
	k := open(t, t.TempDir())
	must(t, k.Remember("r.example.com/app", login("a")))
	k = open(t, k.dir)
	for _, u := range []string{"b", "c"} {
		synctest.Test(t, func(t *testing.T) { must(t, k.Remember("r.example.com/app", login(u))) })
	}
	for _, k := range []*Keychain{k, open(t, k.dir)} {
		if got := resolve(t, k, "r.example.com/app"); got != login("c") {
			t.Errorf("%q, want what was given last", got)
		}
	}
}

func TestForget(t *testing.T) {
	clean(t)
	dir := t.TempDir()
	k := open(t, dir)
	for _, r := range []string{"debian", "r.example.com/used", "r.example.com/again", "r.example.com/new", "r.example.com/unused"} {
		must(t, k.Remember(r, login("u")))
	}
	for _, r := range []string{"index.docker.io/library/debian", "r.example.com/used", "r.example.com/again", "r.example.com/unused"} {
		rewind(t, k, r, 2*grace)
	}
	k = open(t, dir)
	var asked []string
	must(t, k.Forget(func(r string) bool {
		asked = append(asked, r)
		if r == "r.example.com/again" { // a pull comes meanwhile
			must(t, k.Remember(r, login("u")))
		}
		return r == "r.example.com/used"
	}))
	slices.Sort(asked)
	if want := []string{"index.docker.io/library/debian", "r.example.com/again", "r.example.com/unused", "r.example.com/used"}; !slices.Equal(asked, want) {
		t.Errorf("asked about %q, want %q", asked, want)
	}
	for _, k := range []*Keychain{k, open(t, dir)} {
		var left []string
		for r := range k.kept {
			left = append(left, r)
		}
		slices.Sort(left)
		if want := []string{"r.example.com/again", "r.example.com/new", "r.example.com/used"}; !slices.Equal(left, want) {
			t.Errorf("left are %q, want %q", left, want)
		}
	}
}

// TestTogether: many at once, and in the end disk and memory say the same.
func TestTogether(t *testing.T) {
	clean(t)
	dir := t.TempDir()
	k, err := Open(dir, nil)
	must(t, err)
	k.limit = 5
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 12 {
				r := fmt.Sprintf("r.example.com/%d", (i+j)%7)
				done, err := k.try(r, login(fmt.Sprint(i, j)))
				if err == nil {
					err = done(j%5 != 0)
				}
				if err != nil {
					t.Error(err)
				}
				repo, _ := name.NewRepository(r)
				for range k.Candidates(t.Context(), repo) {
				}
				if j%4 == 0 {
					if err := k.Forget(func(string) bool { return false }); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	again := open(t, dir)
	if len(k.tried) != 0 || len(k.kept) != 5 || len(again.kept) != 5 {
		t.Fatalf("%d are tried, %d kept, %d on disk; want 0, 5 and 5", len(k.tried), len(k.kept), len(again.kept))
	}
	for r, g := range k.kept {
		if a := again.kept[r]; a == nil || a.config != g.config || !a.at.Equal(g.at) {
			t.Errorf("%s: on disk is something else than in memory", r)
		}
	}
}
