package store_test

import (
	"crypto/sha256"
	"fmt"
	"os"

	"lazuli/fs/store"
)

// An object goes in under a key that the caller has checked its bytes against, and is a plain file from then on.
func Example() {
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	s, err := store.Open(dir, nil)
	if err != nil {
		panic(err)
	}
	defer s.Close()

	key := store.Key(sha256.Sum256([]byte("what the key is made of")))
	fmt.Println(s.Has(key))
	if err := s.Put(key, []byte("hello")); err != nil {
		panic(err)
	}
	b, err := os.ReadFile(s.Objects() + "/" + key.Path())
	fmt.Println(s.Has(key), string(b), err)
	// Output:
	// false
	// true hello <nil>
}
