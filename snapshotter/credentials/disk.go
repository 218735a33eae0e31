package credentials

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// stored is the file of one repository. Values are bytes, base64 in the file, because a
// password need not be UTF-8.
type stored struct {
	Repository    string    `json:"repository"`
	Given         time.Time `json:"given"`
	Username      []byte    `json:"username,omitempty"`
	Password      []byte    `json:"password,omitempty"`
	IdentityToken []byte    `json:"identitytoken,omitempty"`
	RegistryToken []byte    `json:"registrytoken,omitempty"`
}

// maxFile is more than a file can have: its values in base64, a repository's name and little else.
const maxFile = 2*maxSize + 4096

// unfinished is how names of files begin that are being written.
const unfinished = ".unfinished-"

// Open reads the credentials that were kept in dir, which is made if it is not there, and which only its
// owner can look into afterwards. Files that are damaged are left alone, with a warning. One process at a
// time may have dir open. A nil log is silent.
func Open(dir string, log *slog.Logger) (*Keychain, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	k := &Keychain{dir: dir, log: log, limit: maxRepositories, kept: make(map[string]*given), last: time.Now().Round(0)}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		if strings.HasPrefix(f.Name(), unfinished) {
			os.Remove(path) // of a process that was killed; if it stays, it is only in the way
			continue
		}
		g, err := k.read(path, f.Type())
		if err != nil {
			log.Warn("credentials that cannot be read are ignored: remove the file, and pull the image again if its registry wants a login", "file", path, "error", err)
			continue
		}
		k.kept[g.repository] = g
	}
	for _, old := range k.trim() {
		if err := k.remove(old); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// path returns the file of a repository. Its name is a hash: a repository's can be longer than a file's.
func (k *Keychain) path(repository string) string {
	sum := sha256.Sum256([]byte(repository))
	return filepath.Join(k.dir, hex.EncodeToString(sum[:])+".json")
}

func (k *Keychain) read(path string, kind fs.FileMode) (*given, error) {
	if !kind.IsRegular() {
		return nil, errors.New("not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, errors.New("too long")
	}
	var s stored
	if json.Unmarshal(data, &s) != nil { // whose error could quote what is in the file
		return nil, errors.New("not the JSON that was written")
	}
	repo, err := name.NewRepository(s.Repository)
	if err != nil || repo.Name() != s.Repository || k.path(s.Repository) != path {
		return nil, errors.New("its name does not fit its content")
	}
	config, err := normal(authn.AuthConfig{
		Username:      string(s.Username),
		Password:      string(s.Password),
		IdentityToken: string(s.IdentityToken),
		RegistryToken: string(s.RegistryToken),
	})
	if err != nil {
		return nil, err
	}
	if config == (authn.AuthConfig{}) {
		return nil, errors.New("there are no credentials in it")
	}
	// A clock that was wrong once must not make it the newest for years.
	if s.Given.After(k.last) {
		s.Given = k.last
	}
	return &given{s.Repository, repo.RegistryStr(), s.Given, config}, nil
}

// write writes g's file. k.disk is held.
func (k *Keychain) write(g *given) error {
	data, err := json.Marshal(stored{
		Repository:    g.repository,
		Given:         g.at,
		Username:      []byte(g.config.Username),
		Password:      []byte(g.config.Password),
		IdentityToken: []byte(g.config.IdentityToken),
		RegistryToken: []byte(g.config.RegistryToken),
	})
	if err == nil {
		err = replace(k.path(g.repository), data)
	}
	if err != nil {
		return fmt.Errorf("credentials for %s: kept until the daemon ends, but not on disk: %w", g.repository, err)
	}
	return nil
}

// replace makes data the content of a file that only its owner can read, all of it or nothing.
func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), unfinished) // with mode 0600
	if err != nil {
		return err
	}
	_, err = io.Copy(f, bytes.NewReader(data))
	if err == nil {
		err = f.Sync() // or a power cut leaves an empty file with the final name
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// remove removes g's file. k.disk is held.
func (k *Keychain) remove(g *given) error {
	if err := os.Remove(k.path(g.repository)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("credentials for %s: forgotten until the daemon starts again: %w", g.repository, err)
	}
	return nil
}
