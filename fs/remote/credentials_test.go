package remote

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// fleeting makes a fake's tokens end when it says so: those that ended are refused with a status, and
// without a challenge as registries do that say 403.
type fleeting struct {
	*fake
	refuse int // status
	issued atomic.Int32
}

func newFleeting(t *testing.T, c *content, refuse int) *fleeting {
	f := &fleeting{refuse: refuse}
	f.fake = startFake(t, c, func(s *httptest.Server) {
		inner := s.Config.Handler
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				f.issued.Add(1)
			} else if shown := r.Header.Get("Authorization"); f.refuse == http.StatusForbidden && shown != "" && shown != "Bearer "+f.now() {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			inner.ServeHTTP(w, r)
		})
		s.Start()
	})
	f.set(func() { f.token = "0" })
	return f
}

func (f *fleeting) now() (token string) {
	f.set(func() { token = f.token })
	return token
}

// TestTokenExpiresAgainAndAgain has many readers meet the end of one token after the other: none of them notices, and each token
// is asked for once.
func TestTokenExpiresAgainAndAgain(t *testing.T) {
	c := newContent(4, 1000)
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			f := newFleeting(t, c, status)
			src := f.open(t, Options{})
			const tokens = 5
			for i := range tokens {
				f.set(func() { f.token = fmt.Sprint(i) })
				var wg sync.WaitGroup
				for n := range 16 {
					wg.Go(func() {
						if _, err := readAll(t.Context(), src.Blob(c.layers[n%4]), int64(n), 10); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
			if n := f.issued.Load(); n != tokens {
				t.Errorf("%d tokens were asked for, want %d", n, tokens)
			}
		})
	}
}

// TestPasswordIsCorrected: the keychain is asked again after each refusal, so a login that is made good needs no new Source.
func TestPasswordIsCorrected(t *testing.T) {
	c := newContent(1, 1000)
	for name, with := range map[string]func(*fake){
		"password": func(f *fake) { f.basic = "me:secret" },
		"token":    func(f *fake) { f.token, f.basic = "x", "me:secret" },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, c)
			with(f)
			keys := &login{}
			src := f.open(t, Options{Keychain: keys})
			read := func() error {
				_, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 10)
				return err
			}
			wantError(t, read(), "refuses access", "nobody is logged in")
			keys.user, keys.password = "me", "guess"
			wantError(t, read(), "refuses access", "me's")
			wantError(t, read(), "refuses access", "me's")
			keys.password = "secret"
			for range 2 {
				if err := read(); err != nil {
					t.Error(err)
				}
			}
			f.set(func() { f.basic, f.token = "me:changed", strings.Repeat(f.token, 2) })
			wantError(t, read(), "refuses access", "me's")
			keys.password = "changed"
			if err := read(); err != nil {
				t.Error(err)
			}
		})
	}
}

// broken is a keychain whose helper does not work, until it does.
type broken struct {
	login
	err error
}

func (b *broken) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if b.err != nil {
		return nil, b.err
	}
	return b.login.Resolve(r)
}

func TestKeychainErrorIsOfOneRequest(t *testing.T) {
	c := newContent(1, 1000)
	f, mirror := newFake(t, c), newFake(t, c)
	f.basic = "me:secret"
	keys := &broken{login{user: "me", password: "secret"}, errors.New("helper: exit status 1")}
	src := f.open(t, Options{Keychain: keys})
	_, _, err := src.Root(t.Context())
	wantError(t, err, "credentials for "+f.host(), "helper: exit status 1", "image "+f.host()+"/r:t")
	wantRequests(t, "while the helper is broken", f, 1)
	keys.err = nil
	if _, _, err := src.Root(t.Context()); err != nil {
		t.Error(err)
	}

	// What needs no login needs no keychain, and a mirror that does is not the end.
	keys.err = errors.New("helper: exit status 1")
	mirror.set(func() { mirror.basic = "me:secret" })
	f.set(func() { f.basic = "" })
	read(t, f.openHosts(t, mirrors(mirror), Options{Keychain: keys}), c, 0, 0, 10)
}

// several is a keychain with more than one login for everything.
type several []authn.Authenticator

func (s several) Resolve(authn.Resource) (authn.Authenticator, error) { return s[0], nil }

func (s several) Candidates(context.Context, authn.Resource) iter.Seq2[authn.Authenticator, error] {
	return func(yield func(authn.Authenticator, error) bool) {
		for _, a := range s {
			if a == nil && !yield(nil, errors.New("a helper is broken")) || a != nil && !yield(a, nil) {
				return
			}
		}
	}
}

// TestCandidates: what a registry or its token server refuses is not the keychain's last word.
func TestCandidates(t *testing.T) {
	c := newContent(1, 1000)
	wrong, right := &authn.Basic{Username: "old", Password: "gone"}, &authn.Basic{Username: "me", Password: "secret"}
	for name, with := range map[string]func(*fake){
		"password": func(f *fake) { f.basic = "me:secret" },
		"token":    func(f *fake) { f.basic, f.token = "me:secret", "t" },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, c)
			f.set(func() { with(f) })
			for _, k := range []several{{wrong, right}, {wrong, nil, authn.Anonymous, right}} {
				src := f.open(t, Options{Keychain: k})
				for range 2 {
					if _, err := readAll(t.Context(), src.Blob(c.layers[0]), 0, 10); err != nil {
						t.Errorf("%d candidates: %v", len(k), err)
					}
				}
			}
			many := several{wrong, wrong, wrong, wrong, wrong, wrong, right}
			if _, err := readAll(t.Context(), f.open(t, Options{Keychain: many}).Blob(c.layers[0]), 0, 10); err == nil {
				t.Error("there is no end to what one request tries")
			}
		})
	}
}
